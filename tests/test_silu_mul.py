"""silu_mul against a float64 loop, on every backend."""

import functools

import gradients
import oracle
import peer
import pytest
import refusal
import registration
import shapes
import torch
from tolerance import assert_close, assert_rounded_once, assert_same

from mistral_kernels import ops

OP = "silu_mul"
SHAPES = [(0, 8), (1, 2), (3, 14), (5, 64), (4, 66), (2, 1002), (6,), (2, 0, 8), (2, 3, 48)]
VALID = {"gate_up": torch.randn(3, 8)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(shape, dtype, backend, device):
    gate_up = torch.randn(shape, device=device).mul(3).to(dtype)
    out = ops.silu_mul(gate_up, backend=backend)
    assert out.dtype == dtype and out.is_contiguous()
    exact = torch.from_numpy(oracle.silu_mul(oracle.f64(gate_up)))
    assert_close(out, peer.silu_mul(gate_up), exact, "silu_mul")
    assert_same(ops.silu_mul(gate_up, backend=backend), out, "again")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_once(half, backend, device):
    gate_up = torch.randn(9, 1024, device=device).to(half)
    exact = torch.from_numpy(oracle.silu_mul(oracle.f64(gate_up)))
    assert_rounded_once(ops.silu_mul(gate_up, backend=backend), exact, "silu_mul")


def test_extreme_gates(backend, device):
    gate = torch.tensor([-1e30, -100.0, -0.0, 100.0, 1e30], device=device)
    out = ops.silu_mul(torch.cat((gate, torch.ones_like(gate))), backend=backend)
    exact = torch.tensor([0.0, -100 * 3.72e-44, 0.0, 100.0, 1e30], dtype=torch.float64)
    assert_close(out, exact.float(), exact, "silu_mul")
    nan = ops.silu_mul(torch.tensor([torch.nan, 1.0, 1.0, 1.0], device=device), backend=backend)
    assert nan.isnan().tolist() == [True, False]


def test_infinities_and_nans_as_the_reference(dtype, backend, device):
    values = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 90.0, -90.0, 6e4, -6e4, torch.inf, -torch.inf, torch.nan]
    )
    gate_up = torch.cartesian_prod(values, values).T.reshape(1, -1).to(dtype).to(device)
    out = ops.silu_mul(gate_up, backend=backend)
    expected = ops.silu_mul(gate_up, backend="reference")
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_strided_rows_give_the_bits_of_packed_ones(dtype, backend, device):
    wide = torch.randn(4, 3, 40, device=device).to(dtype)
    for x in (wide[:, 1, 8:24], wide[..., 5:21], wide[..., :16].transpose(0, 1)):
        out = ops.silu_mul(x, backend=backend)
        assert out.is_contiguous()
        assert_same(out, ops.silu_mul(x.contiguous(), backend=backend), "silu_mul")


def test_gradients_on_the_reference():
    ours = functools.partial(ops.silu_mul, backend="reference")
    gradients.check(ours, peer.silu_mul, {"gate_up": torch.randn(2, 3, 6)})


def test_gradients(backend, device):
    ours = functools.partial(ops.silu_mul, backend=backend)
    inputs = {"gate_up": torch.randn(5, 32, device=device)}
    gradients.check_float32(ours, peer.silu_mul, inputs)
    gradients.check_compiled(ours, inputs)


@pytest.mark.parametrize("shape", [(2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_registration(shape, layout, backend, device):
    x = shapes.laid_out(torch.randn(shape, device=device), layout).requires_grad_()
    registration.check("silu_mul", x, backend)


ODD = refusal.Case("gate_up", torch.ones(3, 7), "even", "(3, 7)")


@pytest.mark.parametrize("case", [*refusal.cases(VALID), ODD], ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.silu_mul, VALID, case)
