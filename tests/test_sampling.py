"""Temperature, top-k, top-p and the draw, against a plain-Python walk over sorted probabilities."""

import math

import numpy as np
import pytest
import torch

from mistral_kernels.model.generated_sequence import DRAWS_AT_ONCE, GeneratedSequence
from mistral_kernels.model.sampling import logprobs_of, sample, uniform_draws
from mistral_kernels.model.stop_text import StopText


def walk(logits: list[float], draw: float, temperature: float, top_k, top_p: float) -> int:
    """The token that `draw` falls on when the kept probabilities are laid end to end."""
    largest = max(logits)
    weights = [math.exp((x - largest) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[:top_k]
    total = sum(weights[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        if reached >= top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    point, end = draw * reached, 0.0
    for i in sorted(kept):
        end += weights[i] / total
        if point < end:
            return i
    return max(kept)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("top_p", [1e-9, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("step", [1e-9, 1.5], ids=["different", "equals"])
def test_every_draw_lands_where_the_walk_does(temperature, top_k, top_p, step):
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 2
    logits = (logits / step).round() * step
    draws = [(i + 0.5) / 200 for i in range(200)]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens = sample(logits.expand(200, -1), draws, **options).tolist()
    row = logits[0].tolist()
    assert tokens == [walk(row, draw, temperature, top_k, top_p) for draw in draws]


def test_even_draws_reproduce_the_distribution():
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]])
    n = 10000
    draws = [(i + 0.5) / n for i in range(n)]
    counts = torch.bincount(sample(logits.expand(n, -1), draws, temperature=1.0), minlength=4)
    torch.testing.assert_close(counts / n, torch.softmax(logits[0], 0), atol=1e-3, rtol=0)


def test_order_is_temperature_then_top_k_then_top_p():
    # p = .4 .3 .2 .1; top_k=2 leaves 4/7, 3/7, of which top_p=.5 leaves the first alone. Had top_p
    # come first it would have kept two, and the largest draw would give token 1.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert sample(logits, [0.999], temperature=1.0, top_k=2, top_p=0.5).item() == 0
    assert sample(logits, [0.999], temperature=1.0, top_p=0.5).item() == 1


def test_greedy_takes_the_lowest_of_equals():
    assert sample(torch.tensor([[1.0, 3.0, 3.0]]), [0.9], temperature=0).item() == 1


@pytest.mark.parametrize("options", [{}, {"top_k": 400}, {"top_p": 0.99}])
def test_the_largest_draw_takes_a_token_that_can_be_drawn(options):
    logits = torch.randn(200, 500, generator=torch.Generator().manual_seed(4))
    logits[:, 390:] = -torch.inf
    draws = [1 - 2**-53] * 200
    assert sample(logits, draws, temperature=1.3, **options).max() < 390


@pytest.mark.parametrize("temperature", [1e-310, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature):
    assert sample(torch.tensor([[1.0, 3.0, 2.0]]), [0.9], temperature=temperature).item() == 1


def test_rows_do_not_touch_each_other():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    draws = uniform_draws(7, 0, 5)
    options = {"temperature": 0.8, "top_p": 0.95}
    together = sample(logits, draws, **options).tolist()
    alone = [sample(logits[i : i + 1], draws[i : i + 1], **options).item() for i in range(5)]
    assert together == alone


def test_draws_depend_on_seed_and_step_alone():
    def alone(seed: int, step: int) -> float:
        return np.random.Generator(np.random.Philox(key=seed, counter=step)).random()

    steps = 2 * DRAWS_AT_ONCE + 3
    draws = []
    for seed in (0, 1, 7, 2**64 - 1):
        sequence = GeneratedSequence(0, [1], seed, None, None, StopText(None))
        for sequence.drawn in range(steps):
            draws.append(sequence.draw(0.7))
            assert draws[-1] == alone(seed, sequence.drawn)
        assert sequence.draw(0.0) == 0
    assert uniform_draws(3, 2**64 - 2, 4) == [alone(3, 2**64 - 2 + i) for i in range(4)]
    assert all(0 <= draw < 1 for draw in draws) and len(set(draws)) == len(draws)
    assert 0.45 < sum(draws) / len(draws) < 0.55


def test_logprobs_are_of_the_unscaled_distribution():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([0, 8, 4])
    expected = [math.log(torch.softmax(logits[i], 0)[t]) for i, t in enumerate(tokens)]
    assert logprobs_of(logits, tokens).tolist() == pytest.approx(expected, abs=1e-5)
