"""One token from op to op: where `enable` has a layer go that way, and where it leaves it."""

import io

import peft
import pytest
import torch
from stock_models import MOE, fed, padded, random_ids, stock, switched
from tolerance import AS_EAGER
from torch import nn
from torch.nn.utils import parametrize
from transformers import DynamicCache

from mistral_kernels.integrations import recorded_layers, transformers_decode
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


class Triple(nn.Module):
    def forward(self, weight):
        return 3 * weight


def hook_a_projection(model):
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: 2 * call[-1])


def hook_a_norm(model):
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, call: (call[0] + 1,))


def give_another_forward(model):
    attention = model.model.layers[0].self_attn
    attention.o_proj.forward = lambda x: 2 * nn.functional.linear(x, attention.o_proj.weight)


def parametrise(model):
    parametrize.register_parametrization(
        model.model.layers[0].self_attn.q_proj, "weight", Triple(), unsafe=True
    )


def transpose(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = weight.data.t().contiguous().t()


def turn_in_its_place(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t()


def adapt(model):
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora)


def train(model):
    model.train()


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


def take_their_experts(model):
    model.set_experts_implementation("grouped_mm")


def exchange_a_weight(model):
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(2 * projection.weight)


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
