"""rms_norm and add_rms_norm against a float64 loop, on every backend."""

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

OP = "rms_norm"
EPS = 1e-5
# Empty, one element, tails of a vector of 4 or 8, and a row longer than a block of threads.
SHAPES = [(0, 8), (1, 1), (3, 7), (5, 64), (2, 1000), (2, 4096), (7,), (2, 0, 8), (2, 3, 48)]

X, WEIGHT = torch.randn(3, 8), torch.randn(8)
VALID = {"x": X, "weight": WEIGHT, "eps": EPS}
VALID_ADD = {"x": X, "residual": X, "weight": WEIGHT, "eps": EPS}


def rows(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, what: str) -> None:
    """Compare a normed result with the oracle on the rows of x."""
    flat = oracle.f64(x).reshape(-1, x.shape[-1])
    exact = torch.from_numpy(oracle.rms_norm(flat, oracle.f64(weight), EPS)).view(x.shape)
    assert_close(out, peer.rms_norm(x, weight, EPS), exact, what)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape, dtype, backend, device):
    x, weight = rows(shape, dtype, device), rows(shape[-1:], dtype, device)
    out = ops.rms_norm(x, weight, EPS, backend=backend)
    assert out.dtype == dtype and out.is_contiguous()
    check(out, x, weight, "rms_norm")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_norms_the_rounded_sum(shape, dtype, backend, device):
    x, residual = rows(shape, dtype, device), rows(shape, dtype, device)
    weight = rows(shape[-1:], dtype, device)
    normed, summed = ops.add_rms_norm(x, residual, weight, EPS, backend=backend)
    assert_same(summed, x + residual, "summed")
    check(normed, summed, weight, "normed")


def test_strided_rows_give_the_bits_of_packed_ones(backend, device):
    wide = torch.randn(4, 3, 40, device=device)
    weight = torch.randn(16, device=device)
    for x in (wide[:, 1, 8:24], wide[..., 5:21], wide[..., :16].transpose(0, 1)):
        packed = x.contiguous()
        plain = ops.rms_norm(x, weight, EPS, backend=backend)
        assert plain.is_contiguous()
        assert_same(plain, ops.rms_norm(packed, weight, EPS, backend=backend), "rms_norm")
        strided = ops.add_rms_norm(x, packed, weight, EPS, backend=backend)
        expected = ops.add_rms_norm(packed, x, weight, EPS, backend=backend)
        for got, want, what in zip(strided, expected, ("normed", "summed"), strict=True):
            assert got.is_contiguous()
            assert_same(got, want, what)


def test_a_row_does_not_depend_on_its_neighbours(dtype, backend, device):
    x, weight = rows((33, 129), dtype, device), rows((129,), dtype, device)
    batch = ops.rms_norm(x, weight, EPS, backend=backend)
    assert_same(batch, ops.rms_norm(x, weight, EPS, backend=backend), "again")
    assert_same(batch[7:8], ops.rms_norm(x[7:8], weight, EPS, backend=backend), "one row")


def test_extreme_rows(backend, device):
    weight = torch.ones(64, device=device)
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e-30), torch.full((64,), 1e18))).to(device)
    out = ops.rms_norm(x, weight, EPS, backend=backend)
    check(out, x, weight, "extremes")
    x[1, 3] = torch.nan
    poisoned = ops.rms_norm(x, weight, EPS, backend=backend)
    assert poisoned[1].isnan().all(), "a NaN must show in its row"
    assert_same(poisoned[::2], out[::2], "rows beside a NaN")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_once(half, backend, device):
    x, weight = rows((9, 512), half, device), rows((512,), half, device)
    exact = torch.from_numpy(oracle.rms_norm(oracle.f64(x), oracle.f64(weight), EPS))
    assert_rounded_once(ops.rms_norm(x, weight, EPS, backend=backend), exact, "rms_norm")


def test_large_fp16_values_do_not_overflow(backend, device):
    # The square of 300 does not fit fp16: only fp32 inside gets this right.
    x = torch.full((2, 64), 300.0, dtype=torch.float16, device=device)
    out = ops.rms_norm(x, torch.ones_like(x[0]), EPS, backend=backend)
    assert_same(out, torch.ones_like(x), "fp16")


def both_outputs(x, residual, weight, **backend):
    """One differentiable number for each element of both outputs of add_rms_norm."""
    normed, summed = ops.add_rms_norm(x, residual, weight, EPS, **backend)
    return normed * summed.cos()


def test_gradients_on_the_reference():
    plain = functools.partial(ops.rms_norm, eps=EPS, backend="reference")
    inputs = {"x": torch.randn(2, 3, 5), "weight": torch.randn(5)}
    gradients.check(plain, functools.partial(peer.rms_norm, eps=EPS), inputs)
    gradients.check(
        functools.partial(both_outputs, backend="reference"),
        lambda x, residual, weight: peer.rms_norm(x + residual, weight, EPS) * (x + residual).cos(),
        {"residual": torch.randn(2, 3, 5), **inputs},
    )


def test_gradients(backend, device):
    inputs = {name: torch.randn(6, 32, device=device) for name in ("x", "residual")}
    inputs["weight"] = torch.randn(32, device=device)
    gradients.check_float32(
        functools.partial(both_outputs, backend=backend),
        lambda x, residual, weight: peer.rms_norm(x + residual, weight, EPS) * (x + residual).cos(),
        inputs,
    )
    gradients.check_compiled(functools.partial(both_outputs, backend=backend), inputs)


@pytest.mark.parametrize("shape", [(2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_registration(shape, layout, backend, device):
    x = shapes.laid_out(torch.randn(shape, device=device), layout).requires_grad_()
    weight = torch.randn(8, device=device, requires_grad=True)
    registration.check("rms_norm", x, weight, EPS, backend)
    registration.check("add_rms_norm", x, x, weight, EPS, backend)


SIZES = [refusal.Case("weight", torch.ones(7), "hidden=8", "(7,)")]
ADD_SIZES = [*SIZES, refusal.Case("residual", torch.ones(3, 7), "8", "(3, 7)")]
ADD_SIZES += [refusal.Case("residual", torch.ones(4, 8), "(3, 8)", "(4, 8)")]
MIXED = [refusal.Case("weight", WEIGHT.double(), "torch.float32", "torch.float64")]


@pytest.mark.parametrize("case", [*refusal.cases(VALID), *SIZES, *MIXED], ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.rms_norm, VALID, case)


@pytest.mark.parametrize("case", [*refusal.cases(VALID_ADD), *ADD_SIZES], ids=refusal.case_id)
def test_add_refuses(case):
    refusal.check(ops.add_rms_norm, VALID_ADD, case)
