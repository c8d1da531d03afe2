"""Layers of transformers that replay recorded calls: when they do, and that nobody can tell."""

import pytest
import torch
from layer_changes import (
    adapt,
    exchange_a_weight,
    give_another_forward,
    hook_a_norm,
    hook_a_projection,
    parametrise,
    take_their_experts,
    train,
    transpose,
    turn_in_its_place,
)
from stock_models import MOE, random_ids, stock, switched
from tolerance import AS_EAGER

from mistral_kernels.integrations import recorded_layers, transformers_decode
from mistral_kernels.integrations.transformers import RollingCache, enable
from mistral_kernels.tolerance import error

LAYERS = 2


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def replays(monkeypatch):
    """For each layer that asked for its recording, whether it was replayed."""
    found, look = [], transformers_decode.replayed

    def replayed(*inputs):
        out = look(*inputs)
        found.append(out is not None)
        return out

    monkeypatch.setattr(transformers_decode, "replayed", replayed)
    return found


def turn_threads(model):
    torch.set_num_threads(3 - torch.get_num_threads())


@pytest.mark.parametrize(
    "change, layers",
    [
        (hook_a_projection, {0}),
        (hook_a_norm, {0}),
        (give_another_forward, {0}),
        (parametrise, {0}),
        (transpose, {0}),
        (turn_in_its_place, {0}),
        (adapt, set(range(LAYERS))),
        (train, set(range(LAYERS))),
        (exchange_a_weight, {0}),
        (turn_threads, set(range(LAYERS))),
        (take_their_experts, set(range(LAYERS))),
    ],
)
def test_a_recording_does_not_outlive_a_change(change, layers, replays, monkeypatch):
    """The other model has no recordings: it is not enabled."""
    ids = random_ids(2, 9)
    other, model = (switched(stock("Mixtral", sliding_window=5, **MOE)) for _ in range(2))
    enable(model)
    caches = [RollingCache(model.config) for _ in range(2)]
    threads = torch.get_num_threads()
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        if begin == 7:
            assert replays == [False] * LAYERS + [True] * LAYERS
            for changed in (other, model):
                change(changed)
            torch.set_num_threads(threads) if change is not turn_threads else turn_threads(model)
        expected, logits = (
            each(ids[:, begin:end], past_key_values=cache).logits
            for each, cache in zip((other, model), caches, strict=True)
        )
        assert error(logits, expected).within(AS_EAGER)
    torch.set_num_threads(threads)
    third = replays[2 * LAYERS : 3 * LAYERS]
    assert third == [n not in layers for n in range(len(third))]


def test_a_feed_forward_is_recorded_as_soon_as_it_is_ours(replays):
    """Noise is drawn anew each time: in training alone, which may be that of a part."""
    ids = random_ids(1, 8)
    other, model = (switched(stock("Mixtral", sliding_window=5, **MOE)) for _ in range(2))
    enable(model)
    blocks = [each.model.layers[0].mlp.train() for each in (other, model)]
    for block in blocks:
        block.jitter_noise = 0.3
    caches = [RollingCache(model.config) for _ in range(2)]
    for begin, end in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
        if begin == 5:
            assert replays == [False, False, False, True]
            for block in blocks:
                block.eval()
        logits = []
        for each, cache in zip((other, model), caches, strict=True):
            torch.manual_seed(begin)
            logits.append(each(ids[:, begin:end], past_key_values=cache).logits)
        assert error(logits[1], logits[0]).within(AS_EAGER)
    assert replays[4:] == [False, True, True, True, True, True]


def test_what_beams_move_each_step_is_not_recorded(replays, monkeypatch):
    recorded, record = [], recorded_layers.RecordedCalls
    monkeypatch.setattr(
        recorded_layers, "RecordedCalls", lambda run: recorded.append(run) or record(run)
    )
    model = switched(stock(sliding_window=5))
    ids = random_ids(1, 10).expand(2, -1)
    expected = model(ids, use_cache=False).logits
    enable(model)
    cache, logits = RollingCache(model.config), []
    for begin, end in ((0, 4), *((n, n + 1) for n in range(4, 10))):
        logits.append(model(ids[:, begin:end], past_key_values=cache).logits)
        if begin < 7:
            cache.reorder_cache(torch.tensor([1, 1]))
    assert error(torch.cat(logits, 1), expected).within(AS_EAGER)
    # At first nobody knows; and when it has stayed for a step.
    assert len(recorded) == 2 * LAYERS
    assert replays == [False] * 5 * LAYERS + [True] * LAYERS


def test_what_a_layer_gave_stays(replays):
    """Another step does not write over it, whoever keeps it; caches take turns."""
    model = switched(stock("Mixtral", sliding_window=5, **MOE))
    ids = random_ids(1, 12)
    expected = model(ids, use_cache=False).logits
    enable(model)
    caches = [RollingCache(model.config) for _ in range(2)]
    logits, kept = [], []
    for cache in caches:
        logits.append(model(ids[:, :5], past_key_values=cache).logits)
    for position in range(5, 12):
        for cache in caches:
            out = model.model(ids[:, position : position + 1], past_key_values=cache)
            kept.append((out.last_hidden_state, out.last_hidden_state.clone()))
            logits.append(model.lm_head(out.last_hidden_state))
    assert replays == [False] * 2 * LAYERS + [True] * 12 * LAYERS
    assert all(out.equal(copy) for out, copy in kept)
    for found in (torch.cat(logits[0::2], 1), torch.cat(logits[1::2], 1)):
        assert error(found, expected).within(AS_EAGER)


def test_inference_mode_comes_and_goes(replays):
    model = switched(stock(sliding_window=5))
    ids = random_ids(1, 9)
    expected = model(ids, use_cache=False).logits
    enable(model)
    cache, logits = RollingCache(model.config), []
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        with torch.inference_mode(begin % 2 == 1), torch.no_grad():
            logits.append(model(ids[:, begin:end], past_key_values=cache).logits)
    assert error(torch.cat(logits, 1), expected).within(AS_EAGER)
    assert replays == [False] * LAYERS + [True] * 3 * LAYERS
