"""The shipped csrc/cuda/linear_low_bit.cu on the host emulator."""

import sys

import low_bit_cases
import oracle
import pytest
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing
from emulator.orders import ordered
from low_bit_cases import KINDS, Kind
from test_linear_low_bit import exact_weight
from tolerance import assert_close, assert_same
from torch.nn import functional

from mistral_kernels.ops import dispatch
from mistral_kernels.ops.low_bit import FP8, INT4, INT8, LowBit

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

MODULE = sys.modules["mistral_kernels.ops.linear_low_bit"]
CELL = dispatch.OPS["linear_low_bit"]["cuda"]
DTYPES = pytest.mark.parametrize("dtype", CELL.dtypes, ids=str)


def refusal(x: torch.Tensor, weight: LowBit) -> str | None:
    qweight, scales, zeros, perm = weight
    return CELL.refuses(dict(MODULE._facts(x, qweight, scales, zeros, weight.bits, None, perm)))


def emulate(x: torch.Tensor, weight: LowBit) -> torch.Tensor:
    """Return what the CUDA kernel writes; checks that it writes nothing else."""
    assert refusal(x, weight) is None
    with GuardBands() as guard:
        out = guard.output((len(x), weight.shape[0]), x.dtype)
        given = LowBit(*map(guard, weight))
        MODULE._launch(emulated_core().linear_low_bit_cuda, guard(x), given, out, 0, 0)
    return out


def check(x: torch.Tensor, weight: LowBit) -> torch.Tensor:
    out = emulate(x, weight)
    exact = torch.from_numpy(oracle.linear(oracle.f64(x), exact_weight(weight).numpy()))
    assert_close(out, functional.linear(x, weight.dequantise(x.dtype)), exact, "linear_low_bit")
    return out


@DTYPES
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kinds(kind, dtype):
    # Every warp has steps of a whole row, and some have two; a strip of 16 rows is not full.
    check(torch.randn(3, 1408).to(dtype), low_bit_cases.low_bit((17, 1408), kind))


# (rows, in, out): none; a chunk of 16 bytes; less than a step, a step and a bit; 8 rows; the ring
# of 4 steps a warp, once around and more.
SIZES = [(0, 32, 8), (1, 32, 1), (2, 96, 16), (8, 160, 33), (4, 64, 0), (1, 5152, 9)]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind(INT4, None), torch.bfloat16),
        (Kind(INT4, 32, symmetric=False), torch.float16),
        (Kind(INT8, 32), torch.bfloat16),
        (Kind(FP8, None), torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, kind, dtype):
    rows, in_dim, out_dim = sizes
    check(torch.randn(rows, in_dim).to(dtype), low_bit_cases.low_bit((out_dim, in_dim), kind))


@pytest.mark.parametrize(("codes", "group_size"), [(INT4, 96), (INT4, 384), (INT8, 96)], ids=str)
def test_groups_beside_steps(codes, group_size):
    # A warp's second step, 1024 codes of 4 bits behind its first, is elsewhere in a group.
    weight = low_bit_cases.low_bit((7, 2304), Kind(codes, group_size, symmetric=False))
    check(torch.randn(2, 2304).half(), weight)


@DTYPES
@pytest.mark.parametrize("codes", [INT4, INT8, FP8], ids=str)
def test_every_code_and_zero(codes, dtype):
    # x is a row of the unit matrix, and so out is a column of the weight, to the bit.
    count = 16 if codes == INT4 else 256
    every = torch.arange(count, dtype=torch.int32).to(torch.uint8)
    if codes == INT4:
        qweight = (every | every << 4).expand(16, -1).repeat(2, 1).contiguous()
        zeros = torch.arange(32, dtype=torch.uint8).remainder(17)[:, None]
    elif codes == INT8:
        qweight = every.view(torch.int8).expand(32, -1).contiguous()
        zeros = torch.linspace(-128, 127, 32).round().to(torch.int8)[:, None]
    else:
        qweight = every.clone()
        qweight[[0x7F, 0xFF]] = 0  # not finite
        qweight, zeros = qweight.view(FP8).expand(8, -1).contiguous(), None
    weight = LowBit(qweight, torch.ones(len(qweight), 1), zeros)
    columns = weight.dequantise(dtype).mT
    for first in range(0, len(columns), 8):
        x = torch.eye(len(columns), dtype=dtype)[first : first + 8]
        assert_same(emulate(x, weight) + 0.0, columns[first : first + 8] + 0.0, f"from {first}")


@pytest.mark.parametrize("name", ["int4-g32-act-order", "int8-g128"])
def test_a_row_has_the_same_bits_among_any_others(name):
    x, weight = torch.randn(8, 640).half(), low_bit_cases.low_bit((20, 640), KINDS[name])
    whole = emulate(x, weight)
    for rows in ([4], [7, 3, 5]):
        assert_same(emulate(x[rows], weight), whole[rows], f"rows {rows}")
    x[2] = torch.nan
    out = emulate(x, weight)
    assert out[2].isnan().all()
    assert_same(out[[0, 1, 3]], whole[[0, 1, 3]], "rows beside a NaN")


@pytest.mark.parametrize("name", ["int4-g128-zeros", "int4-g32-act-order", "fp8-row"])
def test_bits_do_not_depend_on_the_order_of_threads(name, orders):
    x, weight = torch.randn(5, 1280).bfloat16(), low_bit_cases.low_bit((24, 1280), KINDS[name])
    with ordered(emulated_core().__file__, "forward"):
        expected = emulate(x, weight)
    with ordered(emulated_core().__file__, orders):
        assert_same(emulate(x, weight), expected, "order")


def test_strided_rows():
    x, weight = torch.randn(3, 192).bfloat16(), low_bit_cases.low_bit((5, 192), KINDS["int8-row"])
    wide = functional.pad(x, (8, 16), value=torch.nan)[:, 8:-16]
    assert_same(emulate(wide, weight), emulate(x, weight), "padded")


@pytest.mark.parametrize(
    ("codes", "columns", "group_size", "words"),
    [
        (INT4, 48, None, "16-byte boundaries, got 8"),
        (INT8, 40, None, "16-byte boundaries, got 8"),
        (INT4, 96, 48, "multiple of 32 columns, got multiples of 16"),
        (INT8, 96, 96, None),
        (INT8, 96, 32, None),
    ],
)
def test_refuses_by_memory(codes, columns, group_size, words):
    weight = low_bit_cases.low_bit((2, columns), Kind(codes, group_size))
    said = refusal(torch.ones(1, columns).half(), weight)
    assert said is None if words is None else words in said
    shifted = functional.pad(torch.ones(2, columns), (1, 7)).half()[:, 1:-7]
    assert "boundaries, got 2" in (refusal(shifted, weight) or "") or words


def test_refuses_by_name():
    assert "up to 8 rows, got 9" in CELL.refuses({"rows": 9})
    assert CELL.refuses({"rows": 8}) is None and CELL.refuses({}) is None, "what a model asks"
