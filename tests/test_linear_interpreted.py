"""linear's Triton kernel in Triton's interpreter, in tiles that few rows already cross.

Run with TRITON_INTERPRET=1 set before the process starts: `TRITON_INTERPRET=1 pytest -m
interpreter`. `test_linear.py` runs the same backend there in the tiles that are shipped.
"""

from itertools import product

import oracle
import pytest
import torch
from tolerance import assert_close, assert_same
from torch.nn import functional

from mistral_kernels.ops import dispatch, linear

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]
DTYPES = pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES, ids=str)


ROWS = [(torch.float32, rows) for rows in (1, 3, 4, 5, 8, 9, 17)]
ROWS += [(dtype, 17) for dtype in (torch.bfloat16, torch.float16)]
SIZES = [(torch.float32, *sizes) for sizes in product((1, 15, 16, 17, 33, 64), (1, 7, 8, 9, 16))]
SIZES += [(dtype, 33, 9) for dtype in (torch.bfloat16, torch.float16)]


@pytest.fixture
def kernel(monkeypatch):
    """The kernel file, with tiles of 4 rows, 8 columns and 16 of k, two row tiles a group."""
    from mistral_kernels.kernels import linear as kernel

    small = {"BLOCK_M": 4, "BLOCK_N": 8, "BLOCK_K": 16, "GROUP_M": 2}
    shipped = kernel.tile_config
    monkeypatch.setattr(kernel, "tile_config", lambda *how: shipped(*how) | small)
    return kernel


def between_nans(tensor: torch.Tensor) -> torch.Tensor:
    """The same rows, starting at an odd element, with NaN before and behind them."""
    return functional.pad(tensor, (1, 2), value=torch.nan)[..., 1:-2]


def check(x: torch.Tensor, weight: torch.Tensor, **how) -> torch.Tensor:
    out = linear(x, weight, **how, backend="triton")
    exact = torch.from_numpy(oracle.linear(oracle.f64(x), oracle.f64(weight)))
    assert_close(out, functional.linear(x, weight), exact, "linear")
    return out


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("dtype", "rows"), ROWS, ids=str)
def test_rows_around_tiles_and_groups(rows, batch_invariant, dtype, kernel):
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(19, 24).to(dtype)
    check(between_nans(x), between_nans(weight), batch_invariant=batch_invariant)


@pytest.mark.parametrize(("dtype", "in_dim", "out_dim"), SIZES, ids=str)
def test_columns_and_k_around_a_tile(in_dim, out_dim, dtype, kernel):
    x, weight = torch.randn(3, in_dim).to(dtype), torch.randn(out_dim, in_dim).to(dtype)
    check(between_nans(x), between_nans(weight))


def test_nothing_to_add_up_gives_0(kernel):
    assert_same(check(torch.ones(5, 0), torch.ones(9, 0)), torch.zeros(5, 9), "linear")


@DTYPES
def test_a_nan_stays_in_its_row_and_its_column(dtype, kernel):
    x, weight = torch.randn(6, 40).to(dtype), torch.randn(10, 40).to(dtype)
    clean = check(x, weight)
    x[[1, 5], 39], weight[9, 0] = torch.nan, torch.nan
    out = linear(x, weight, backend="triton")
    assert out[[1, 5]].isnan().all() and out[:, 9].isnan().all()
    others = [0, 2, 3, 4]
    assert_same(out[others, :9], clean[others, :9], "beside a NaN")


@DTYPES
def test_a_tile_s_place_decides_no_bits(dtype, kernel):
    x, weight = torch.randn(30, 50).to(dtype), torch.randn(20, 50).to(dtype)
    whole = linear(x, weight, batch_invariant=True, backend="triton")
    for first, count in ((0, 1), (3, 1), (29, 1), (5, 4), (6, 13), (1, 29)):
        part = linear(x[first : first + count], weight, batch_invariant=True, backend="triton")
        assert_same(part, whole[first : first + count], f"rows {first} to {first + count}")


def test_rows_2_gb_apart(kernel):
    torch.use_deterministic_algorithms(False)  # so that untouched memory stays unused
    apart = 2**30  # elements: the third row begins at 2^31
    memory = torch.empty(2 * apart + 64, dtype=torch.float16)
    x, weight = (memory[first:].as_strided((3, 24), (apart, 1)) for first in (0, 32))
    x.copy_(torch.randn(3, 24))
    weight.copy_(torch.randn(3, 24))
    check(x, weight)


@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_tile_config_fits_and_knows_no_batch_if_invariant(arch, dtype):
    from mistral_kernels.kernels import linear as kernel
    from mistral_kernels.kernels.processor import shared_bytes

    fixed = kernel.tile_config(1, dtype, arch, True)
    for rows in (1, 8, 16, 17, 64, 65, 4096, 10**6):
        assert kernel.tile_config(rows, dtype, arch, True) == fixed
        config = kernel.tile_config(rows, dtype, arch, False)
        assert config["BLOCK_M"] >= min(rows, 64)
        for chosen in (config, fixed):
            stage = (chosen["BLOCK_M"] + chosen["BLOCK_N"]) * chosen["BLOCK_K"] * dtype.itemsize
            assert chosen["num_stages"] >= 2
            assert chosen["num_stages"] * stage <= shared_bytes(arch)
