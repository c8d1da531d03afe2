"""The emulator itself: what works on a GPU works on it, and what does not is noticed."""

import sys
from pathlib import Path

import pytest
from emulator.host_build import EMULATOR, build, missing, run_sanitized

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

PRELUDE = """
import ctypes, sys
from emulator.host_build import load
from pathlib import Path
selftest = load("selftest", Path(sys.argv[1]))
floats = (ctypes.c_float * 384)(*range(384))
sums = (ctypes.c_float * 3)()
ints = (ctypes.c_int * 32)(*range(32))
"""


def run(code: str):
    """Runs Python code on the kernels of selftest.cu, under AddressSanitizer."""
    library = build("selftest", EMULATOR / "selftest.cu", sanitize=True)
    tests = str(Path(__file__).parent.parent)
    return run_sanitized([sys.executable, "-c", PRELUDE + code, str(library)], PYTHONPATH=tests)


def test_barriers_and_shuffles_add_up():
    code = "selftest.block_sum(ctypes.addressof(floats), ctypes.addressof(sums), 3)"
    result = run(f"{code}\nassert list(sums) == [sum(floats[i:i+128]) for i in (0, 128, 256)]")
    assert result.returncode == 0, result.stderr


def test_dynamic_shared_memory_is_shared():
    result = run(
        "selftest.reverse(ctypes.addressof(ints), 32, 0)\nassert list(ints) == [*range(31, -1, -1)]"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("reverse(ctypes.addressof(ints), 32, 1)", "use-after-poison"),
        ("static_overrun(ctypes.addressof(ints), 4)", "index 4 out of bounds"),
        ("static_overrun(ctypes.addressof(ints) + 4, 3)", "buffer-overflow"),
        ("static_overrun(ctypes.addressof(ints) + 1, 3)", "misaligned address"),
        ("divergent(ctypes.addressof(ints))", "a barrier that not all threads reach"),
        ("absent_lane(ctypes.addressof(ints))", "a lane outside the mask"),
        ("too_many_threads(ctypes.addressof(ints))", "cudaErrorInvalidConfiguration"),
    ],
)
def test_notices(call, message):
    result = run(f"selftest.{call}")
    assert result.returncode != 0
    assert message in result.stderr
