"""No kernel is shipped that the emulator does not run."""

from pathlib import Path

import pytest
import torch
from emulator.host_build import CSRC, EMULATOR, build, missing
from emulator.kernels import declared_kernels, launched_kernels
from emulator.selftest import Selftest

TESTS = Path(__file__).parent.parent
SOURCES = sorted(path for path in CSRC.rglob("*.cu") if "__global__" in path.read_text())


def test_headers_declare_no_kernel():
    # A kernel belongs to one op, whose test runs it.
    assert not [path for path in CSRC.rglob("*.*h") if "__global__" in path.read_text()]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_an_op_with_kernels_has_tests_that_run_them(source):
    # `test_emulated_sanitized.py` runs these, and fails where a declared kernel was not launched.
    assert declared_kernels(source)
    assert (TESTS / f"test_{source.stem}_emulated.py").is_file(), "kernels that no test runs"


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_kernels_that_ran_are_known_by_name():
    source = EMULATOR / "selftest.cu"
    library = build("selftest", source)
    before = launched_kernels(library)
    Selftest(library).async_but_two(torch.zeros(16), torch.zeros(16))
    assert launched_kernels(library) == before | {"async_kernel"}
    assert before | {"async_kernel"} < declared_kernels(source) and "error_of" not in before
