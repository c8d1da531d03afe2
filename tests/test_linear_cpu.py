"""The C++ kernel of linear: edges of its tiles, thread counts, and when torch takes over."""

import sys
from functools import partial

import oracle
import pytest
import torch
from native_only import torch_ops_of
from tolerance import assert_close, assert_same
from torch.nn import functional

from mistral_kernels.ops import dispatch, linear

pytest.importorskip("mistral_kernels._C", reason="installed without a C++ compiler")
pytestmark = pytest.mark.usefixtures("each_instruction_set")

MODULE = sys.modules["mistral_kernels.ops.linear"]


@pytest.fixture(params=dispatch.KERNEL_DTYPES, ids=str)
def dtype(request):
    return request.param


def operands(rows, in_dim, out_dim, dtype):
    return torch.randn(rows, in_dim).to(dtype), torch.randn(out_dim, in_dim).to(dtype)


# `in` around a vector of 4 to 32 elements and around the 512 columns that 8 rows take at a time.
@pytest.mark.parametrize("in_dim", [0, 1, 7, 31, 33, 64, 511, 513, 1000])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
def test_sizes_around_a_vector(rows, in_dim, dtype):
    x, weight = operands(rows, in_dim, 37, dtype)
    out = linear(x, weight, backend="cpu")
    exact = torch.from_numpy(oracle.linear(oracle.f64(x), oracle.f64(weight)))
    assert_close(out, functional.linear(x, weight), exact, "linear")


@pytest.mark.parametrize("in_dim", [33, 1000])
def test_a_row_has_the_same_bits_among_any_others(in_dim, dtype):
    x, weight = operands(70, in_dim, 50, dtype)
    run = partial(linear, weight=weight, batch_invariant=True, backend="cpu")
    whole = run(x)  # 64 rows at a time, 8 in a tile
    for rows in (*range(1, 10), 17, 40):
        assert_same(run(x[70 - rows :]), whole[70 - rows :], f"{rows} rows")
        assert_same(run(x[:rows]), whole[:rows], f"first {rows} rows")


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_bits_do_not_depend_on_the_number_of_threads(rows, dtype, threads):
    x, weight = operands(rows, 500, 300, dtype)  # enough for 3 threads to be worth waking
    run = partial(linear, x, weight, batch_invariant=True, backend="cpu")
    threads(1)
    expected = run()
    for count in (2, 3):
        threads(count)
        assert_same(run(), expected, f"{count} threads")


@pytest.mark.parametrize("rows", [1, 6])
def test_what_lies_between_strided_rows_is_not_read(rows, dtype):
    x, weight = operands(rows, 45, 19, dtype)
    wide_x, wide_weight = x.new_full((rows, 50), torch.nan), x.new_full((19, 64), torch.nan)
    wide_x[:, 2:47], wide_weight[:, 5:50] = x, weight
    out = linear(wide_x[:, 2:47], wide_weight[:, 5:50], backend="cpu")
    assert_same(out, linear(x, weight, backend="cpu"), "strided")


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_only_many_rows_go_to_torch(batch_invariant, dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "few_rows", lambda dtype: 5)
    run = dispatch.OPS["linear"]["cpu"].run
    for rows in (0, 1, 5, 6):
        x, weight = operands(rows, 40, 24, dtype)
        ops = torch_ops_of(run, x, weight, batch_invariant)
        assert bool(ops) == (rows == 6 and not batch_invariant), (rows, ops)
        exact = torch.from_numpy(oracle.linear(oracle.f64(x), oracle.f64(weight)))
        assert_close(
            run(x, weight, batch_invariant),
            functional.linear(x, weight),
            exact.view(rows, 24),
            f"{rows} rows",
        )


def test_decode_is_ours_in_every_dtype():
    for dtype in dispatch.KERNEL_DTYPES:
        assert MODULE.few_rows(dtype) >= 8
