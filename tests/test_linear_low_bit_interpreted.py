"""linear_low_bit's Triton kernel in Triton's interpreter, in tiles that few rows already cross.

Run with TRITON_INTERPRET=1 set before the process starts: `TRITON_INTERPRET=1 pytest -m
interpreter`. `test_linear_low_bit.py` runs the same backend there in the tiles that are shipped.
"""

import low_bit_cases
import oracle
import pytest
import torch
from low_bit_cases import KINDS, Kind
from test_linear_low_bit import exact_weight
from tolerance import assert_close, assert_same
from torch.nn import functional

from mistral_kernels.ops import dispatch, linear_low_bit
from mistral_kernels.ops.low_bit import FP8, INT4, INT8, LowBit

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
BLOCK_K = 64


@pytest.fixture
def kernel(monkeypatch):
    """The kernel file, with tiles of 4 rows, 16 columns and 64 of k, two row tiles a group."""
    from mistral_kernels.kernels import linear_low_bit as kernel

    small = {"BLOCK_M": 4, "BLOCK_N": 16, "BLOCK_K": BLOCK_K, "GROUP_M": 2}
    shipped = kernel.tile_config
    monkeypatch.setattr(kernel, "tile_config", lambda *how: shipped(*how) | small)
    return kernel


def run(x: torch.Tensor, weight: LowBit, bits: int, group_size: int | None) -> torch.Tensor:
    how = {"zeros": weight.zeros, "perm": weight.perm, "bits": bits, "group_size": group_size}
    return linear_low_bit(x, weight.qweight, weight.scales, **how, backend="triton")


def check(x: torch.Tensor, weight: LowBit, kind: Kind) -> torch.Tensor:
    out = run(x, weight, **kind.how)
    exact = oracle.linear(oracle.f64(x), exact_weight(weight).numpy())
    peer = functional.linear(x, weight.dequantise(x.dtype))
    assert_close(out, peer, torch.from_numpy(exact), "linear_low_bit")
    return out


def between_nans(x: torch.Tensor) -> torch.Tensor:
    """The same rows, starting at an odd element, with NaN before and behind them."""
    return functional.pad(x, (1, 2), value=torch.nan)[..., 1:-2]


# Groups of a step, of more than a step, of no power of two; `in` around a step (64).
GROUPS = [(128, 16), (96, 48), (384, 96), (128, 128), (56, None), (72, None), (192, 64)]


@pytest.mark.parametrize("codes", [INT4, INT8, FP8], ids=str)
@pytest.mark.parametrize(("in_dim", "group_size"), GROUPS, ids=str)
def test_groups_and_k_around_a_step(in_dim, group_size, codes, kernel):
    kind = Kind(codes, group_size, symmetric=codes == FP8)
    weight = low_bit_cases.low_bit((9, in_dim), kind)
    check(between_nans(torch.randn(5, in_dim)), weight, kind)


@pytest.mark.parametrize("rows", [1, 4, 9, 17])
@pytest.mark.parametrize("out_dim", [1, 16, 33])
def test_rows_and_columns_around_tiles(rows, out_dim, kernel):
    kind = KINDS["int4-g32-act-order"]
    check(between_nans(torch.randn(rows, 64)), low_bit_cases.low_bit((out_dim, 64), kind), kind)


@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("codes", [INT4, INT8], ids=str)
def test_every_code_and_zero_is_exact(codes, dtype):
    # Rows of the identity pick single weights, which are exact in any dtype.
    steps = torch.arange(256).view(16, 16) - (0 if codes == INT4 else 128)
    qweight = steps.to(codes).repeat(1, 4)
    zeros = (torch.arange(16) + (1 if codes == INT4 else -112))[:, None].to(codes)
    weight = LowBit(qweight, torch.full((16, 1), 0.25), zeros)
    in_dim = weight.shape[1]
    out = run(torch.eye(in_dim, dtype=dtype), weight, weight.bits, None)
    assert_same(out, weight.dequantise(dtype).T.contiguous(), "weights")


@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES, ids=str)
def test_every_finite_fp8_is_exact(dtype):
    bits = torch.arange(256, dtype=torch.uint8)
    finite = bits[(bits & 0x7F) != 0x7F]
    qweight = torch.cat((finite, finite[:2])).view(8, 32).view(FP8)
    for scales in (torch.ones(8, 1), torch.ones(8, 2)):
        out = run(torch.eye(32, dtype=dtype), LowBit(qweight, scales), 8, 32 // scales.shape[1])
        # -0 of the codes comes out as 0.
        assert_same(out, qweight.to(dtype).T.contiguous() + 0, "weights")


def test_a_nan_stays_in_its_row_and_its_column(kernel):
    kind = KINDS["int8-g128"]
    x, weight = torch.randn(6, 256), low_bit_cases.low_bit((20, 256), kind)
    clean = check(x, weight, kind)
    x[[1, 5], 200], weight.scales[18, 1] = torch.nan, torch.nan
    out = run(x, weight, **kind.how)
    assert out[[1, 5]].isnan().all() and out[:, 18].isnan().all()
    others = [0, 2, 3, 4]
    assert_same(out[others, :18], clean[others, :18], "beside a NaN")


def test_rows_of_no_whole_words_are_refused():
    weight = LowBit(torch.ones(3, 18, dtype=torch.int8), torch.ones(3, 1))
    with pytest.raises(ValueError, match="rows of codes on 4-byte boundaries, got 2"):
        run(torch.ones(2, 18), weight, 8, None)


@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_tile_config_fits(arch, dtype):
    from mistral_kernels.kernels import linear_low_bit as kernel
    from mistral_kernels.kernels.processor import shared_bytes

    for rows in (1, 16, 17, 64, 65, 10**6):
        for name, bits in (("int4", 4), ("int8", 8), ("fp8", 8)):
            config = kernel.tile_config(rows, dtype, arch, name)
            codes = config["BLOCK_N"] * bits // 8
            stage = config["BLOCK_K"] * (config["BLOCK_M"] * dtype.itemsize + codes)
            assert config["num_stages"] >= 2
            assert config["num_stages"] * stage <= shared_bytes(arch)
            assert config["BLOCK_K"] * bits // 32 >= 16, "tl.dot adds up 16 products at least"
