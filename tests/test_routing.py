"""Expert choices: recorded in the order of the calls, replayed, and judged by float64's logits."""

import math

import pytest
import torch
from tiny_models import random_model, random_prompts

from mistral_kernels.routing import Route, gap_limit, recorded, same_choices, widest_gap
from mistral_kernels.tolerance import MAX_FLOOR, MAX_RATIO

LOGITS = torch.tensor([[4.0, 3.0, 1.0, 0.5], [0.0, 2.0, 2.25, 7.0]], dtype=torch.float64)


def route(*expert_ids: list[int], logits: torch.Tensor = LOGITS) -> Route:
    return Route(logits, torch.tensor(expert_ids, dtype=torch.int32))


@pytest.mark.parametrize(
    "expert_ids, gap",
    [
        (([0, 1], [3, 2]), -0.25),
        (([1, 0], [2, 3]), -0.25),
        (([0, 1], [3, 1]), 0.25),
        (([0, 2], [3, 1]), 2.0),
        (([2, 3], [3, 1]), 3.5),
        (([0, 0], [3, 2]), math.inf),
        (([0, 1, 2, 3], [0, 1, 2, 3]), -math.inf),
    ],
)
def test_gap_is_between_the_best_left_out_and_the_worst_chosen(expert_ids, gap):
    assert widest_gap(route(*expert_ids)) == gap


def test_gap_limit_is_the_room_of_two_logits():
    exact = route([0, 1], [3, 2])
    peer = route([0, 1], [3, 2], logits=LOGITS + torch.tensor([0, 0, 0.5, -0.25]))
    assert gap_limit(peer, exact) == 2 * (MAX_RATIO * 0.5 + MAX_FLOOR)


def test_choices_are_the_same_only_in_all_layers():
    one, other = route([0, 1], [3, 2]), route([0, 1], [3, 1])
    assert same_choices([one, other], [one, other]) and same_choices([], [])
    assert not same_choices([one, one], [one, other])


def forward(model, replay=()):
    """The logits and routes of one call, without a cache."""
    prompts = [torch.tensor(ids) for ids in random_prompts([5, 3])]
    with recorded(model, replay) as routes:
        return model.forward(torch.cat(prompts), [5, 3]), routes


@torch.inference_mode()
def test_replay_takes_the_experts_and_weighs_them_anew():
    model = random_model(experts=4, top_k=2)
    kernels = dict(model.layers[0].kernels)
    logits, routes = forward(model)
    assert len(routes) == len(model.layers)
    assert all(len(r.logits) == len(r.expert_ids) == 8 and widest_gap(r) <= 0 for r in routes)
    again, replayed = forward(model, routes)
    assert same_choices(routes, replayed)
    torch.testing.assert_close(again, logits)

    others = [Route(r.logits, (r.expert_ids + 1) % 4) for r in routes]
    elsewhere, replayed = forward(model, others)
    assert same_choices(others, replayed) and (elsewhere - logits).abs().max() > 1e-3
    assert model.layers[0].kernels == kernels, "the model's own routers are back"


@torch.inference_mode()
def test_replay_brings_ids_into_range():
    model = random_model(experts=4, top_k=2)
    wild = torch.tensor([[-1, 9]] * 8, dtype=torch.int32)
    _, routes = forward(model, [Route(LOGITS, wild)] * len(model.layers))
    assert all(torch.equal(r.expert_ids, wild.clamp(0, 3)) for r in routes)


@torch.inference_mode()
def test_a_dense_model_has_no_routes():
    assert forward(random_model(experts=0, top_k=0))[1] == []
