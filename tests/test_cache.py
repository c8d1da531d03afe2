"""The cache's book-keeping: sizes, room, rollback, reset, and what it refuses."""

import re

import pytest
import torch
from checkpoints import tiny_config
from tiny_models import feed, random_model, random_prompts
from tolerance import assert_same

from mistral_kernels.model.cache import KVCache
from mistral_kernels.ops import dispatch


def new_cache(batch=1, max_tokens=64, windows=(4, None), **kwargs) -> KVCache:
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    return KVCache(tiny_config(windows=windows), batch, max_tokens, **place, **kwargs)


@pytest.mark.parametrize("page_size", [None, 16, 64])
def test_bytes_at_32k_tokens_are_an_eighth_plus_at_most_a_page(page_size):
    rolling, full = (
        new_cache(2, 32768, windows=(window,) * 2, page_size=page_size) for window in (4096, None)
    )
    layer = rolling.layers[0]
    page_bytes = layer.k[0].numel() * layer.k.element_size()
    pages_over = 0 if page_size is None else 2 * 2 * 2  # layers, sequences, k and v: one page each
    assert full.nbytes // 8 <= rolling.nbytes <= full.nbytes // 8 + pages_over * page_bytes
    assert rolling.nbytes == sum(
        t.untyped_storage().nbytes() for layer in rolling.layers for t in (layer.k, layer.v)
    )


@pytest.mark.parametrize(
    ("window", "max_tokens", "lookahead", "page_size", "capacity"),
    [
        (4, 64, 0, 1, 4),
        (4, 64, 3, 1, 7),
        (4, 64, 0, 16, 16),
        (20, 64, 0, 16, 32),
        (100, 64, 8, 16, 64),
        (None, 64, 8, 16, 64),
        (None, 65, 0, None, 80),
    ],
)
def test_capacity(window, max_tokens, lookahead, page_size, capacity):
    cache = new_cache(
        3, max_tokens, windows=(window,) * 2, lookahead=lookahead, page_size=page_size
    )
    for layer in cache.layers:
        assert layer.capacity == capacity
        assert layer.block_table.dtype == torch.int32
        assert sorted(layer.block_table.flatten().tolist()) == list(range(len(layer.k)))


def test_the_cpu_needs_no_workspace():
    for backend in ("auto", "reference"):
        assert {layer.workspace for layer in new_cache(2, backend=backend).layers} == {None}


def test_a_prompt_longer_than_the_cache_changes_nothing():
    model = random_model(windows=(4, None))
    cache = model.new_cache(2, 8)
    prompts = random_prompts([8, 9])
    feed(model, cache, prompts, [3, 3])
    before = [(layer.k.clone(), layer.v.clone()) for layer in cache.layers]
    message = "sequence 1 would reach 9 tokens, but the cache was made for max_tokens=8"
    with pytest.raises(ValueError, match=re.escape(message)):
        feed(model, cache, prompts, [1, 6])
    assert cache.lengths == [3, 3]
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        assert_same(layer.k, k, "k")
        assert_same(layer.v, v, "v")


def test_reset_frees_one_place():
    model = random_model(windows=(4, None))
    cache = model.new_cache(2, 16)
    prompts = random_prompts([10, 7])
    feed(model, cache, prompts, [10, 7])
    cache.reset(0)
    assert cache.lengths == [0, 7]
    again = feed(model, cache, [prompts[1], []], [7, 0])[0]
    alone = feed(model, None, [prompts[1]], [7])[0]
    torch.testing.assert_close(again, alone)


def test_rollback_refuses_what_the_ring_has_lost():
    model = random_model(windows=(4, None))
    cache = model.new_cache(1, 32, lookahead=2, page_size=1)
    feed(model, cache, random_prompts([12]), [12])
    with pytest.raises(ValueError, match="rollback: 4 tokens .* more than lookahead 2"):
        cache.rollback(4)
    with pytest.raises(ValueError, match=re.escape("rollback: tokens must be in [0, 12]")):
        cache.rollback(13)
    with pytest.raises(ValueError, match="rollback: tokens must have 1 entries, got 2"):
        cache.rollback([1, 1])
    for tokens in ([1.0], 1.5, "1", None):
        with pytest.raises(TypeError, match="rollback: tokens must be an int or a list of ints"):
            cache.rollback(tokens)
    for place in (1, -1, "0"):
        with pytest.raises(ValueError, match=re.escape("reset: sequence must be in [0, 1)")):
            cache.reset(place)
    assert cache.lengths == [12]
    cache.rollback([2])
    assert cache.lengths == [10]


def test_rollback_of_everything_empties_a_place():
    model = random_model(windows=(4, None))
    cache = model.new_cache(1, 32, page_size=1)
    (prompt,) = random_prompts([12])
    feed(model, cache, [prompt], [12])
    cache.rollback(12)
    got = torch.cat([feed(model, cache, [prompt], [n])[0] for n in (3, 1, 8)])
    torch.testing.assert_close(got, feed(model, None, [prompt], [12])[0])


def test_pages_that_the_backend_does_not_take_go_to_another(monkeypatch):
    # Stands for the CUDA kernel, which takes multiples of 16.
    cell = dispatch.OPS["decode_attention"]["reference"]
    picky = cell._replace(
        refuses=lambda facts: "odd pages" if facts.get("page_size") == 3 else None
    )
    monkeypatch.setitem(dispatch.OPS["decode_attention"], "cpu", picky)
    monkeypatch.setattr(dispatch, "choose", dispatch.choose.__wrapped__)  # it remembers cells
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    model, (prompt,) = random_model(dtype=torch.float32, windows=(4, None)), random_prompts([9])
    model.set_backend("auto")
    assert model.backends["decode_attention"] == "cpu"
    taken, other = (model.new_cache(1, 32, page_size=size) for size in (4, 3))
    assert {layer.decode for layer in taken.layers} == {None}
    assert {layer.decode.backend for layer in other.layers} == {"reference"}
    one, two = (
        torch.cat([feed(model, c, [prompt], [n])[0] for n in (8, 1)]) for c in (taken, other)
    )
    torch.testing.assert_close(one, two)
    model.set_backend("cpu")
    with pytest.raises(ValueError, match="decode_attention: backend 'cpu' .* odd pages"):
        model.new_cache(1, 32, page_size=3)


@pytest.mark.parametrize(
    ("kwargs", "exception", "message"),
    [
        ({"batch": -1}, ValueError, "batch must be >= 0, got -1"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be >= 1, got 0"),
        ({"max_tokens": 2**31}, ValueError, "max_tokens must be <= 2147483647, got 2147483648"),
        ({"max_tokens": 8.0}, TypeError, "max_tokens must be an int, got float"),
        ({"lookahead": -1}, ValueError, "lookahead must be >= 0, got -1"),
        ({"page_size": 0}, ValueError, "page_size must be >= 1, got 0"),
        ({"page_size": True}, TypeError, "page_size must be an int, got bool"),
    ],
)
def test_bad_sizes(kwargs, exception, message):
    with pytest.raises(exception, match=f"new_cache: {message}"):
        new_cache(**kwargs)
