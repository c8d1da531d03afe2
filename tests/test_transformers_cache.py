"""`RollingCache` in transformers' generate(), and what it keeps, takes back and refuses."""

import pytest
import torch
from stock_models import MOE, fed, padded, random_ids, stock, switched
from torch import Tensor
from transformers import StaticCache

from mistral_kernels.integrations.rolling_cache import layer_windows
from mistral_kernels.integrations.transformers import RollingCache

WINDOW = 8
GREEDY = {"max_new_tokens": 4 * WINDOW, "do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "family, window, fields",
    [("Mistral", None, {}), ("Mistral", WINDOW, {}), ("Mixtral", WINDOW, MOE)],
)
def test_generate(family, window, fields):
    model = stock(family, sliding_window=window, **fields)
    batch = padded(random_ids(4, 20), 20, 13, 1, 20)
    ways = {
        "greedy": GREEDY,
        "sampling": GREEDY | {"do_sample": True, "top_k": 20},
        "beams": GREEDY | {"num_beams": 3},
        "chunked prefill": GREEDY | {"prefill_chunk_size": 6},
    }

    def generate(name: str, **cache):
        torch.manual_seed(2)
        return model.generate(**batch, **ways[name], **cache)

    expected = {name: generate(name) for name in ways}
    switched(model)
    # The caches that transformers makes: all ways for one model, one way for the others.
    for name in ways if family == "Mistral" and window else ("greedy",):
        for made in ({}, {"cache_implementation": "static"}):
            assert generate(name, **made).equal(expected[name]), (name, made)
    cache = RollingCache(model.config)
    for name in ways:
        assert generate(name, past_key_values=cache).equal(expected[name]), name
        cache.reset()


def test_a_second_turn_goes_on_from_the_first():
    model = stock(sliding_window=WINDOW)
    first, more = random_ids(1, 12), random_ids(1, 20)[:, 12:]

    def two_turns(cache) -> Tensor:
        # transformers would take generated zeros for padding.
        how = GREEDY | {"past_key_values": cache, "suppress_tokens": [0]}
        prompt = torch.cat((model.generate(first, **how), more), 1)
        return model.generate(prompt, **how)

    expected = two_turns(None)
    switched(model)
    assert two_turns(RollingCache(model.config)).equal(expected)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_assisted_decoding(window):
    model, draft = stock(sliding_window=window), stock(sliding_window=None)
    for parameter in draft.parameters():  # near enough for drafts that are right now and then
        parameter.add_(0.02 * torch.randn_like(parameter))
    draft.generation_config.update(
        num_assistant_tokens=4,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    prompt = random_ids(1, 12)
    expected = model.generate(prompt, **GREEDY)
    switched(model)
    for way in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        cache = RollingCache(model.config, lookahead=4)
        assert model.generate(prompt, past_key_values=cache, **GREEDY, **way).equal(expected)
    if window:
        with pytest.raises(ValueError, match="with lookahead=N"):
            cache = RollingCache(model.config)
            model.generate(prompt, past_key_values=cache, assistant_model=draft, **GREEDY)


def test_tokens_are_taken_back_as_far_as_the_ring_reaches():
    model = switched(stock(sliding_window=WINDOW))
    ids = random_ids(1, 40)
    whole = model(ids, use_cache=False).logits
    cache = RollingCache(model.config, page_size=1, lookahead=3)
    model(ids[:, :30], past_key_values=cache)
    for taken in (4, 0):  # lookahead and one more; then none is left to take
        cache.crop(-taken)
        assert cache.get_seq_length() == 26
    logits = model(ids[:, 26:31], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole[:, 26:31], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="overwrote keys still needed"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="crop takes -31 .. 0, got 1"):
        cache.crop(1)


def test_memory_is_that_of_the_windows():
    """At 16k tokens with window 1024 as much as transformers' sliding cache, not a slot more."""
    config = stock(sliding_window=1024).config
    key = torch.zeros(1, 2, 1, 16)
    ours, theirs = RollingCache(config), StaticCache(config, max_cache_len=16384)
    for cache in (ours, theirs):
        cache.early_initialization(1, 2, 16, key.dtype, key.device)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.layers)
    assert ours.nbytes == kept == 2 * 2 * 2 * 1024 * 16 * 4
    mixed = {"layer_types": ["full_attention", "sliding_attention"]}
    assert layer_windows(stock("Ministral", sliding_window=8, **mixed).config) == [None, 8]


def test_full_layers_grow_and_keep_what_they_hold():
    model = switched(stock("Llama"))
    cache = RollingCache(model.config, page_size=4)
    for tokens in (3, 30, 1):
        model(random_ids(2, tokens), past_key_values=cache)
        assert tokens <= cache.layers[0].capacity <= 1.25 * cache.get_seq_length() + 4
    buffer = cache.layers[0].keys
    model(random_ids(2, 1), past_key_values=cache)
    assert cache.layers[0].keys is buffer  # no copy of it for a token


def test_refusals():
    model = stock(sliding_window=WINDOW)
    ids = random_ids(2, 5)
    cache = RollingCache(model.config)
    with pytest.raises(AttributeError, match='attn_implementation="mistral_kernels" only'):
        model(ids, past_key_values=cache)  # eager
    switched(model)
    with pytest.raises(RuntimeError, match="never attended"):
        model(ids, past_key_values=cache)
    cache.reset()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 sequences, got 1; reset"):
        model(ids[:1], past_key_values=cache)
    other = stock(sliding_window=WINDOW, num_key_value_heads=1)
    expected = other(ids, use_cache=False).logits
    switched(other)
    with pytest.raises(ValueError, match=r"\(kv_heads, head_dim\) \(2, 16\), got \(1, 16\)"):
        other(ids, past_key_values=cache)
    with pytest.raises(ZeroDivisionError):
        with model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0):
            model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="layer 1 holds 5 tokens before 5 new ones, layer 0 15"):
        model(ids, past_key_values=cache)
    cache.reset()
    logits = fed(other, ids, torch.ones_like(ids), cache, (4, 1))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    narrow = RollingCache(stock(sliding_window=4).config)
    with pytest.raises(ValueError, match="a window of 8, but its ring was made for 4"):
        model(ids, past_key_values=narrow)
    short = RollingCache(model.config, max_tokens=6)
    with pytest.raises(ValueError, match="would reach 7 tokens.*max_tokens=6"):
        model.generate(ids, past_key_values=short, **GREEDY)
    with pytest.raises(ValueError, match="linear_attention"):
        layer_windows(stock("Qwen3", layer_types=["full_attention", "linear_attention"]).config)
    with pytest.raises(TypeError, match="lookahead must be an int"):
        RollingCache(model.config, lookahead=1.0)
    with pytest.raises(ValueError, match="page_size must be >= 1, got 0"):
        RollingCache(model.config, page_size=0)
