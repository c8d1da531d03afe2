"""The C++ kernel of linear_low_bit: odd sizes, every code, when torch takes over, and how much."""

import sys
from functools import partial

import low_bit_cases
import oracle
import pytest
import torch
from low_bit_cases import KINDS, Kind
from native_only import torch_ops_of
from test_linear_low_bit import exact_weight
from tolerance import assert_close, assert_same
from torch.nn import functional

from mistral_kernels.ops import dispatch, linear_low_bit
from mistral_kernels.ops.low_bit import FP8, INT4, INT8, LowBit

pytest.importorskip("mistral_kernels._C", reason="installed without a C++ compiler")
pytestmark = pytest.mark.usefixtures("each_instruction_set")

MODULE = sys.modules["mistral_kernels.ops.linear_low_bit"]
# (in, kind): rows that no vector fills, groups that none ends at, more columns than x has room for
# in L1, more products than are added up at once.
SIZES = [
    (8, Kind(INT4, None)),
    (72, Kind(INT4, None, symmetric=False, scales=torch.float32)),
    (144, Kind(INT4, 16, scales=torch.float16)),
    (560, Kind(INT4, 80, symmetric=False)),
    (4320, Kind(INT4, 48, symmetric=False, shuffled=True)),
    (4608, Kind(INT4, 768)),
    (1, Kind(INT8, None)),
    (77, Kind(INT8, None, symmetric=False)),
    (144, Kind(INT8, 16, symmetric=False, scales=torch.float16)),
    (4320, Kind(INT8, 720, scales=torch.float32)),
    (513, Kind(FP8, None, shuffled=True)),
    (560, Kind(FP8, 112)),
]


def call(x: torch.Tensor, weight: LowBit, kind: Kind) -> torch.Tensor:
    qweight, scales, zeros, perm = weight
    return linear_low_bit(x, qweight, scales, zeros, perm=perm, **kind.how, backend="cpu")


def check(out: torch.Tensor, x: torch.Tensor, weight: LowBit) -> None:
    exact = torch.from_numpy(oracle.linear(oracle.f64(x), exact_weight(weight).numpy()))
    assert_close(out, functional.linear(x, weight.dequantise(x.dtype)), exact, "linear_low_bit")


@pytest.fixture
def only_ours(monkeypatch):
    monkeypatch.setattr(MODULE, "many_rows", lambda dtype, bits: (sys.maxsize, dtype))


@pytest.mark.parametrize(("in_dim", "kind"), SIZES, ids=str)
def test_odd_sizes(in_dim, kind):
    weight = low_bit_cases.low_bit((37, in_dim), kind)
    for rows in (1, 2, 3, 9):
        x = torch.randn(rows, in_dim + 3)[:, 2:-1]  # rows that start anywhere
        check(call(x, weight, kind), x, weight)


@pytest.mark.parametrize("flush", [False, True])
def test_every_code_has_its_value(flush):
    """With 1 for x and a scale, each output is one code; some are subnormal numbers of fp8."""
    bytes_ = torch.arange(256).to(torch.uint8)
    numbers = {FP8: bytes_[bytes_ & 127 != 127].view(FP8), INT8: bytes_.view(torch.int8)}
    numbers[INT4] = torch.stack((bytes_, *[torch.full_like(bytes_, 0x88)] * 3), -1)
    for codes, qweight in numbers.items():
        qweight = qweight.view(len(qweight), -1)
        kind = Kind(codes, None)
        for x, scale in ((1.0, 1.0), (2.0**-100, 2.0**100), (2.0**100, 2.0**-100)):
            weight = LowBit(qweight, torch.full((len(qweight), 1), scale))
            rows = torch.zeros(2, weight.shape[1])
            rows[0, 0] = rows[1, -1 if codes != INT4 else 1] = x
            expected = (rows.double() @ weight.dequantise(torch.float64).mT).float()
            # What this drops would be slow where it is kept.
            torch.set_flush_denormal(flush)
            out = call(rows, weight, kind)
            torch.set_flush_denormal(False)
            assert torch.equal(out, expected), f"{codes}, x {x}"


@pytest.mark.parametrize("name", ["int4-g32-act-order", "int8-g128", "fp8-row"])
def test_bits_depend_neither_on_other_rows_nor_on_threads(name, threads, only_ours):
    kind = KINDS[name]
    weight = low_bit_cases.low_bit((300, 768), kind)
    x = torch.randn(70, 768)
    threads(1)
    whole = call(x, weight, kind)  # 64 rows at a time, 8 in a tile
    for rows in (*range(1, 10), 17):
        assert_same(call(x[70 - rows :], weight, kind), whole[70 - rows :], f"{rows} rows")
    for count in (2, 3):
        threads(count)
        assert_same(call(x, weight, kind), whole, f"{count} threads")


@pytest.mark.parametrize("name", KINDS)
def test_blocks_are_dequantised_as_the_layout_says(name, monkeypatch):
    """Many rows meet the weight block by block, of which no more than BLOCK_BYTES exist."""
    weight = low_bit_cases.low_bit((37, 384), KINDS[name])
    monkeypatch.setattr(MODULE, "BLOCK_BYTES", 10 * 384 * 4)
    unit = torch.eye(384)
    for dtype in dispatch.KERNEL_DTYPES:
        out = torch.empty(384, 37, dtype=dtype)
        run = partial(MODULE.multiply_dequantised, unit.to(dtype), weight, out)
        size = dtype.itemsize
        products = [op for op in torch_ops_of(run) if "mm" in op]
        assert len(products) == -(-37 * 384 * size // MODULE.BLOCK_BYTES)
        assert_same(out.mT.contiguous(), weight.dequantise(dtype), str(dtype))


def test_only_many_rows_go_to_torch(monkeypatch):
    run = dispatch.OPS["linear_low_bit"]["cpu"].run
    for dtype in dispatch.KERNEL_DTYPES:
        kind = KINDS["int4-g128-zeros"]
        *tensors, perm = weight = low_bit_cases.low_bit((24, 256), kind)
        for rows in (0, 1, 5, 6):
            x = torch.randn(rows, 256).to(dtype)
            with monkeypatch.context() as patch:
                patch.setattr(MODULE, "many_rows", lambda dtype, bits: (6, torch.float32))
                inputs = (x, *tensors, kind.bits, kind.group_size, perm)
                assert bool(torch_ops_of(run, *inputs)) == (rows == 6)
                check(run(*inputs), x, LowBit(*weight))
        assert MODULE.many_rows(dtype, 8)[0] > 8  # decode is ours
