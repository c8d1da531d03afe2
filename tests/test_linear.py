"""linear against a float64 loop, on every backend."""

import functools

import gradients
import oracle
import pytest
import refusal
import registration
import shapes
import torch
from tolerance import assert_close, assert_same
from torch.nn import functional

from mistral_kernels import ops

OP = "linear"
# (x's shape, out): no rows, decode's 1 to 8 rows, more rows, odd sizes, leading dimensions, out 0.
CASES = [
    ((0, 8), 4),
    ((1, 1), 1),
    ((1, 64), 33),
    ((2, 7), 5),
    ((8, 96), 17),
    ((9, 96), 17),
    ((65, 40), 24),
    ((2, 3, 16), 8),
    ((3, 8), 0),
]
VALID = {"x": torch.randn(3, 8), "weight": torch.randn(5, 8), "batch_invariant": True}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("shape", "out_dim"), CASES, ids=str)
def test_linear(shape, out_dim, batch_invariant, dtype, backend, device):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(out_dim, shape[-1], device=device).to(dtype)
    out = ops.linear(x, weight, batch_invariant=batch_invariant, backend=backend)
    assert out.dtype == dtype and out.is_contiguous()
    exact = oracle.linear(oracle.f64(x).reshape(-1, shape[-1]), oracle.f64(weight))
    assert_close(out, functional.linear(x, weight), torch.from_numpy(exact).view_as(out), "linear")
    again = ops.linear(x, weight, batch_invariant=batch_invariant, backend=backend)
    assert_same(again, out, "again")


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 33])
def test_batch_invariant_rows_do_not_depend_on_their_neighbours(rows, dtype, backend, device):
    x = torch.randn(40, 160, device=device).to(dtype)
    weight = torch.randn(48, 160, device=device).to(dtype)
    linear = functools.partial(ops.linear, weight=weight, batch_invariant=True, backend=backend)
    batch = linear(x)
    # From an odd row on, so that the alignment of a row changes too.
    assert_same(linear(x[3 : 3 + rows]), batch[3 : 3 + rows], "rows")
    assert_same(linear(x[3 : 3 + rows].clone()), batch[3 : 3 + rows], "copied rows")


def test_strided_operands(dtype, backend, device):
    x = torch.randn(6, 50, device=device).to(dtype)[::2, 7:39]
    weight = torch.randn(10, 40, device=device).to(dtype)[:, :32]
    out = ops.linear(x, weight, batch_invariant=True, backend=backend)
    packed = ops.linear(x.contiguous(), weight.contiguous(), batch_invariant=True, backend=backend)
    assert_same(out, packed, "linear")


def test_gradients_on_the_reference():
    inputs = {"x": torch.randn(2, 3, 5), "weight": torch.randn(4, 5)}
    for batch_invariant in (False, True):
        ours = functools.partial(ops.linear, batch_invariant=batch_invariant, backend="reference")
        gradients.check(ours, lambda x, weight: functional.linear(x, weight), inputs)


def test_gradients(backend, device):
    ours = functools.partial(ops.linear, backend=backend)
    inputs = {"x": torch.randn(4, 32, device=device), "weight": torch.randn(24, 32, device=device)}
    gradients.check_float32(ours, lambda x, weight: functional.linear(x, weight), inputs)
    gradients.check_compiled(ours, inputs)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_registration(shape, layout, batch_invariant, backend, device):
    x = shapes.laid_out(torch.randn(shape, device=device), layout).requires_grad_()
    weight = torch.randn(5, 8, device=device, requires_grad=True)
    registration.check("linear", x, weight, batch_invariant, backend)


REFUSED = [
    *refusal.cases(VALID),
    refusal.Case("x", torch.ones(8), "in", "(8,)"),
    refusal.Case("weight", torch.ones(5, 7), "in=8", "(5, 7)"),
    refusal.Case("weight", torch.ones(5, 8).half(), "torch.float32", "torch.float16"),
]


@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.linear, VALID, case)
