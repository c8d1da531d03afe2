"""One token from op to op: where `enable` has a layer go that way, and where it leaves it."""

import io

import pytest
import torch
from layer_changes import (
    adapt,
    give_another_forward,
    hook_a_norm,
    hook_a_projection,
    parametrise,
    train,
    transpose,
)
from stock_models import MOE, fed, padded, random_ids, stock, switched
from tolerance import AS_EAGER
from torch import nn
from transformers import DynamicCache

from mistral_kernels.integrations import transformers_decode
from mistral_kernels.integrations.transformers import RollingCache, enable
from mistral_kernels.tolerance import error

LAYERS, CHUNKS = 2, (9, 1, 1, 6, 1, 12)
MIXED = {"layer_types": ["full_attention", "sliding_attention"]}
CASES = [
    ("Mistral", {"sliding_window": None}),
    ("Mistral", {"sliding_window": 1}),
    ("Mistral", {"sliding_window": 5}),
    ("Mixtral", {"sliding_window": 5} | MOE),
    ("Ministral", {"sliding_window": 5} | MIXED),
    ("Llama", {}),
]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def ways(monkeypatch):
    """For each layer that looked at one token, whether it went the short way."""
    found, look = [], transformers_decode._one_token

    def one_token(*inputs):
        out = look(*inputs)
        found.append(out is not None)
        return out

    monkeypatch.setattr(transformers_decode, "_one_token", one_token)
    return found


@pytest.mark.parametrize("family, fields", CASES)
def test_as_eager(family, fields, ways):
    model = stock(family, **fields)
    ids, mask = padded(random_ids(3, 30), 30, 23, 1).values()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    enable(switched(model))
    logits = fed(model, ids, mask, RollingCache(model.config), CHUNKS)
    visible = mask.bool()
    assert error(logits[visible], expected[visible]).within(AS_EAGER)
    assert ways == [True] * CHUNKS.count(1) * LAYERS


def test_a_reset_cache_takes_another_batch(ways):
    model = switched(stock(sliding_window=5))
    ids = random_ids(3, 4)
    expected = model(ids, use_cache=False).logits
    enable(model)
    cache = RollingCache(model.config)
    for rows in (slice(0, 1), slice(0, 3), slice(2, 3)):
        logits = fed(model, ids[rows], torch.ones_like(ids[rows]), cache, (1, 1, 2))
        assert error(logits, expected[rows]).within(AS_EAGER)
        cache.reset()
    assert ways == 3 * ([False] * LAYERS + [True] * LAYERS)


@pytest.mark.parametrize(
    "change, layers",
    [
        (hook_a_projection, [False, True]),
        (hook_a_norm, [False, True]),
        (give_another_forward, [False, True]),
        (parametrise, [False, True]),
        (transpose, [False, True]),
        (adapt, [False, False]),
        (train, [False, False]),
    ],
)
def test_a_layer_that_was_changed_goes_the_long_way(change, layers, ways):
    ids = random_ids(2, 9)
    eager, model = (stock(sliding_window=5) for _ in range(2))
    before = eager(ids, use_cache=False).logits
    enable(switched(model))
    for changed in (eager, model):
        change(changed)
    expected = eager(ids, use_cache=False).logits
    if change not in (transpose, train):
        assert not error(expected, before).within(AS_EAGER)
    logits = fed(model, ids, torch.ones_like(ids), RollingCache(model.config), (8, 1))
    assert error(logits, expected).within(AS_EAGER)
    assert ways == layers


def test_a_changed_feed_forward_is_called(ways):
    """By a layer that goes the short way up to there."""
    ids = random_ids(2, 9)
    eager, model = (stock("Mixtral", sliding_window=5, **MOE) for _ in range(2))
    enable(switched(model))
    for changed in (eager, model):
        gate = changed.model.layers[0].mlp.gate
        gate.register_forward_hook(lambda module, x, out: (out[0], 2 * out[1], out[2]))
    expected = eager(ids, use_cache=False).logits
    logits = fed(model, ids, torch.ones_like(ids), RollingCache(model.config), (8, 1))
    assert error(logits, expected).within(AS_EAGER)
    assert ways == [True] * LAYERS


def test_who_watches_sees_all_calls(ways):
    model = stock("Mixtral", sliding_window=5, **MOE)
    ids = random_ids(1, 6)
    expected = model(ids, use_cache=False).logits[:, -1]
    enable(switched(model))

    def last(cache) -> torch.Tensor:
        model(ids[:, :5], past_key_values=cache)
        return model(ids[:, 5:], past_key_values=cache, output_hidden_states=True)

    out = last(DynamicCache(config=model.config))
    assert ways == [False] * LAYERS
    assert error(out.logits[:, 0], expected).within(AS_EAGER)
    ways.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    last(RollingCache(model.config))
    handle.remove()
    assert ways == []
    out = last(RollingCache(model.config))
    assert error(out.logits[:, 0], expected).within(AS_EAGER)
    assert len(out.hidden_states) == LAYERS + 1
    assert ways == [False] * LAYERS  # transformers hooks attention too, as soon as it is asked once
    with pytest.raises(ValueError, match="output_attentions.*eager"):
        model(ids[:, 5:], past_key_values=RollingCache(model.config), output_attentions=True)
    cache = RollingCache(model.config)
    last(cache)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="use_cache=False"):
        model(ids[:, 5:], past_key_values=cache)


def test_an_enabled_model_can_be_pickled():
    model = switched(stock("Mixtral", sliding_window=5, **MOE))
    enable(model)
    file = io.BytesIO()
    torch.save(model, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    ids = random_ids(1, 6)
    expected = fed(model, ids, torch.ones_like(ids), RollingCache(model.config), (5, 1))
    model.model.norm.weight.zero_()  # of which the other holds a copy
    logits = fed(again, ids, torch.ones_like(ids), RollingCache(again.config), (5, 1))
    assert logits.equal(expected) and expected.any()
