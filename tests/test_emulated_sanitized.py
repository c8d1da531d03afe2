"""Every CUDA kernel's tests on the host emulator once more, under sanitizers.

One process for all of them, since half of what such a process costs is to load torch.
"""

from pathlib import Path

import pytest
from emulator.host_build import missing, run_tests_sanitized

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def test_under_address_and_undefined_behaviour_sanitizers():
    run_tests_sanitized(sorted(Path(__file__).parent.glob("test_*_emulated.py")))
