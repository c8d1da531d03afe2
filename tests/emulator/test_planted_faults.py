"""A kernel with a fault fails the comparison that the same kernel without it passes."""

import sys
from pathlib import Path

import pytest
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import EMULATOR, build, missing, run_sanitized
from emulator.orders import ORDERS, ordered
from emulator.planted_faults import Fault, plant
from emulator.selftest import Selftest

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = EMULATOR / "split_sum.cu"
TILE, PER_SPLIT = 256, 2
FAULTS = [
    Fault("barrier removed", "    __syncthreads();  // all copies", "    // all copies"),
    Fault("wait removed", "    wait_copies<kStages - 2>();\n", ""),
    Fault("wait for too few", "wait_copies<kStages - 2>", "wait_copies<kStages - 1>"),
    Fault("index off by one", "int split = 0; split < splits", "int split = 0; split + 1 < splits"),
    Fault("index one too far", "split < splits; ++split", "split <= splits; ++split"),
    Fault("mask missing", "tile * kTile + i < count ? value : 0.0f", "value"),
    Fault("counter not reset", "counters + row, splits - 1)", "counters + row, 0xffffffffu)"),
    Fault(
        "reduction in the order of arrival",
        "partials + row * splits + split)",
        "partials + row * splits + (blockIdx.x + split) % splits)",
    ),
]
# Its result is right, since the numbers are masked once more: only AddressSanitizer sees the read.
READ_OUTSIDE = Fault(
    "copy not masked",
    "i < count ? row + i : row,\n                  i < count);",
    "row + i, true);",
)


def check_split_sum(kernels: Selftest) -> None:
    """Sums rows whose last tile is short, twice with one workspace, in every order."""
    rows, count = 3, 5 * TILE * PER_SPLIT - 131
    numbers = torch.full((rows, count + 3), torch.nan)  # behind a row lies NaN
    numbers[:, :count] = torch.randn(rows, count)
    exact = numbers[:, :count].double().sum(1)
    first = None
    for order in ORDERS:
        with ordered(kernels.file, order), GuardBands() as guard:
            given = guard(numbers)
            partials = guard.output((rows, 5), torch.float32)
            counters = guard(torch.zeros(rows, dtype=torch.int32), mutated=True)
            for _ in range(2):
                out = guard.output((rows,), torch.float32)
                kernels.split_sum(given, out, partials, counters, rows, count, count + 3, PER_SPLIT)
                assert ((out - exact).abs() < 1e-3).all(), f"{order}: {out} is not {exact}"
                first = out if first is None else first
                assert out.equal(first), f"{order}: other bits"


def test_without_a_fault():
    check_split_sum(Selftest(build("split_sum", SOURCE)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_notices(fault):
    kernels = Selftest(build("split_sum", plant(SOURCE, fault)))
    with pytest.raises(AssertionError, match="is not|other bits|written"):
        check_split_sum(kernels)


def test_address_sanitizer_notices_a_read_in_a_guard_band():
    library = build("split_sum", plant(SOURCE, READ_OUTSIDE), sanitize=True)
    tests = str(Path(__file__).parent.parent)
    code = "import sys; from emulator.test_planted_faults import Selftest, check_split_sum;"
    code += "check_split_sum(Selftest(sys.argv[1]))"
    result = run_sanitized([sys.executable, "-c", code, str(library)], PYTHONPATH=tests)
    assert result.returncode != 0 and "use-after-poison" in result.stderr, result.stderr
