"""Rounding with error compensation: a plain loop in float64, and what it is for."""

import pytest
import torch

from mistral_kernels.model.error_compensation import (
    DAMPING,
    Inputs,
    compensate,
    inverse_factor,
    quantise_compensated,
)
from mistral_kernels.model.scale_search import FACTORS, search_scales
from mistral_kernels.ops.low_bit import FP8, HALF_SPAN, INT4, INT8, quantise, round_to_codes

KINDS = {"int4": INT4, "int8": INT8, "fp8": FP8}


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs of which a few directions hold the most, as those of a model."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.linspace(2, -2, columns).exp()
    return torch.randn(rows, columns, generator=generator) * spread @ mixed


def compensated_one_by_one(weight, scales, gram, order, group_size):
    """Optimal brain quantisation of one weight after another, each time with a fresh inverse."""
    weight, gram = weight.double().clone(), gram.double()
    for step, j in enumerate(order.tolist()):
        rest = order[step:]
        inverse = torch.linalg.inv(gram[rest][:, rest])
        scale = scales[:, j // group_size].double()
        rounded = (weight[:, j] / scale).round().clamp(-8, 7) * scale
        error = (weight[:, j] - rounded) / inverse[0, 0]
        weight[:, rest] -= error[:, None] * inverse[0]
        weight[:, j] = rounded
    return weight


def test_it_is_the_loop_in_float64(monkeypatch):
    monkeypatch.setattr("mistral_kernels.model.error_compensation.BLOCK", 5)
    inputs, weight = correlated(300, 32), torch.randn(12, 32)
    given = Inputs(lambda: [(inputs[:99], inputs[:99]), (inputs[99:], inputs[99:])])
    gram = inputs.double().T @ inputs.double()
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    assert torch.allclose(given.damped(DAMPING).double(), gram, rtol=1e-4, atol=1e-3)
    assert given.order.tolist() == gram.diagonal().argsort(descending=True).tolist()
    scales = search_scales(weight, INT4, 16, torch.bfloat16, given.importance)
    found = compensate(weight, scales, INT4, given.order, given.factor)
    expected = compensated_one_by_one(weight, scales, gram, given.order, 16)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_the_factor_is_that_of_the_inverse():
    gram = correlated(400, 24).double()
    gram = gram.T @ gram
    factor = inverse_factor(gram)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ gram, torch.eye(24, dtype=gram.dtype), atol=1e-8)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_outputs_change_less_than_by_rounding_to_nearest(kind):
    inputs, weight = correlated(2000, 64), torch.randn(40, 64)
    seen, unseen = inputs[:1000], inputs[1000:]
    given = Inputs(lambda: [(seen, seen)])

    def error(low_bit) -> float:
        return ((low_bit.dequantise(torch.float32) - weight) @ unseen.T).norm().item()

    plain = error(quantise(weight, kind, 32 if kind == INT4 else None))
    size = 32 if kind == INT4 else None
    searched = search_scales(weight, kind, size, torch.float32)
    nearest = error(round_to_codes(weight, searched, None, kind))
    compensated = error(quantise_compensated(weight, kind, size, torch.float32, given))
    assert nearest <= 1.02 * plain and compensated < 0.75 * nearest


def test_it_makes_up_for_what_became_of_the_inputs():
    before, weight = correlated(6000, 64), torch.randn(40, 64)
    inputs = before + 0.2 * before.roll(1, 1)
    wanted = before @ weight.T

    def error(given: Inputs) -> float:
        low_bit = quantise_compensated(weight, INT8, None, torch.float32, given)
        return (inputs @ low_bit.dequantise(torch.float32).T - wanted).norm().item()

    assert error(Inputs(lambda: [(inputs, before)])) < 0.5 * error(
        Inputs(lambda: [(inputs, inputs)])
    )


def test_the_fit_is_the_least_squares_one(monkeypatch):
    monkeypatch.setattr("mistral_kernels.model.error_compensation.STILL_ROWS", 0)
    before, inputs, weight = correlated(500, 16), correlated(500, 16, seed=1), torch.randn(8, 16)
    inputs, lost = before + 0.1 * inputs, torch.randn(500, 8)
    halves = [tuple(x[:200] for x in (inputs, before, lost))]
    halves += [tuple(x[200:] for x in (inputs, before, lost))]
    wanted = before.double() @ weight.double().T + lost.double()
    expected = torch.linalg.lstsq(inputs.double(), wanted).solution.T
    assert torch.allclose(Inputs(lambda: halves).fit(weight).double(), expected, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 3])
def test_where_few_inputs_came_it_rounds_to_nearest(rows):
    """Few give a matrix without an inverse; none at all leave every value free."""
    weight, inputs = torch.randn(8, 32), correlated(3, 32)[:rows]
    found = quantise_compensated(
        weight, INT4, 16, torch.float32, Inputs(lambda: [(inputs, inputs)])
    )
    searched = search_scales(weight, INT4, 16, torch.float32)
    nearest = round_to_codes(weight, searched, None, INT4).dequantise(torch.float32)
    found = found.dequantise(torch.float32)
    assert torch.isfinite(found).all()
    if rows:
        assert ((found - weight) @ inputs.T).norm() < ((nearest - weight) @ inputs.T).norm()
    else:
        assert torch.equal(found, nearest)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_searched_scales_are_the_best_of_those_tried(kind):
    weight = torch.randn(6, 64) ** 3
    weight[2, :32] = 0  # a group of nothing
    importance = torch.rand(64) + 0.1
    found = search_scales(weight, kind, 32, torch.bfloat16, importance)
    assert found.dtype == torch.bfloat16 and found.shape == (6, 2) and found[2, 0] == 0

    def errors(scales: torch.Tensor) -> torch.Tensor:
        values = round_to_codes(weight, scales, None, kind).dequantise(torch.float64)
        return ((values - weight) ** 2 * importance).unflatten(1, (2, 32)).sum(-1)

    largest = weight.unflatten(1, (2, 32)).abs().amax(-1) / HALF_SPAN[kind]
    tried = torch.stack([errors((largest * factor).bfloat16()) for factor in FACTORS])
    assert torch.allclose(errors(found), tried.amin(0), rtol=1e-4)
    assert (errors(found) < errors(largest.bfloat16())).any()
