"""A model with a rolling cache, fed by any schedule, gives the logits of the whole run at once.

In float64, where a wrong key cannot hide behind rounding; every slot starts as NaN and the pages of
all sequences are mixed. The run without a cache is itself held to transformers and golden logits.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import feed, feed_all, poison, random_model, random_prompts, shuffle_pages
from tolerance import FLOAT64

from mistral_kernels.tolerance import error

W = 6  # not a multiple of the page size below
SCHEDULES = {
    "token by token": [[1]] * 20,
    "chunks shorter than the window": [[4]] * 5,
    "chunks as long as the window": [[W]] * 4,
    "chunks longer than the window": [[13], [9], [2]],
    "one chunk wraps twice, then decode": [[17], *[[1]] * 5],
    "wrap inside a chunk": [[5], [3], [5], [1], [6]],
    "ten windows of decode": [[3], *[[1]] * (10 * W)],
    "ragged": [[5, 9, 1], [2, 13, 1], [1, 1, 1], [4, 1, 7]],
    "joining late": [[7, 0, 0], [1, 3, 0], [1, 1, 0], [5, 1, 8], [1, 0, 1], [0, 1, 1]],
    "nobody feeds": [[3, 2], [0, 0], [1, 4]],
}


def assert_same_logits(model, schedule, **geometry) -> None:
    totals = [sum(column) for column in zip(*schedule, strict=True)]
    prompts = random_prompts(totals, model.config.vocab)
    whole = feed(model, None, prompts, totals)
    cache = shuffle_pages(poison(model.new_cache(len(totals), max(totals), **geometry)))
    pieces = feed_all(model, cache, prompts, schedule)
    assert cache.lengths == totals
    for got, expected in zip(pieces, whole, strict=True):
        assert error(got, expected).within(FLOAT64), error(got, expected)


@pytest.mark.parametrize("page_size", [None, 1, 4, 16])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(schedule, page_size):
    model = random_model(windows=(W, None), layers=2)
    assert_same_logits(model, schedule, page_size=page_size)


@pytest.mark.parametrize("windows", [(1, 2, 50), (None, 3, None), (2, 5, 11)])
def test_every_layer_has_its_own_window(windows):
    model = random_model(windows=windows, layers=3)
    assert_same_logits(model, SCHEDULES["ragged"], page_size=4)


def test_mixture_of_experts():
    model = random_model(windows=(W, W), experts=4, top_k=2)
    assert_same_logits(model, SCHEDULES["joining late"], page_size=4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_geometry(data):
    draw = data.draw
    batch = draw(st.integers(1, 3))
    rows = st.lists(st.integers(0, 15), min_size=batch, max_size=batch)
    schedule = draw(st.lists(rows, min_size=1, max_size=6).filter(lambda s: any(map(any, s))))
    windows = (draw(st.integers(1, 12)), draw(st.none() | st.integers(1, 30)))
    assert_same_logits(
        random_model(windows=windows),
        schedule,
        page_size=draw(st.none() | st.integers(1, 9)),
        lookahead=draw(st.integers(0, 5)),
    )


@pytest.mark.parametrize("cached", [False, True])
def test_packed_prompts_never_see_each_other(cached):
    model = random_model(windows=(W, None))
    first, second, other = random_prompts([9, 7, 9])

    def logits(prompts):
        cache = model.new_cache(len(prompts), 16) if cached else None
        halves = [[len(p) // 2 for p in prompts], [len(p) - len(p) // 2 for p in prompts]]
        if cached:
            return feed_all(model, cache, prompts, halves)
        return feed(model, None, prompts, [len(p) for p in prompts])

    alone = logits([second])[0]
    for neighbour in (first, other):
        # Close, not equal: a BLAS may round a row by how many others there are.
        assert error(logits([neighbour, second])[1], alone).within(FLOAT64)


def test_the_token_just_outside_the_window_has_no_influence():
    model = random_model(windows=(W,), layers=1)
    (prompt,) = random_prompts([W + 4])
    changed = [(prompt[0] + 1) % model.config.vocab, *prompt[1:]]
    for cached in (False, True):
        caches = [model.new_cache(1, 32) if cached else None for _ in range(2)]
        a, b = (
            feed(model, cache, [tokens], [len(prompt)])[0]
            for cache, tokens in zip(caches, (prompt, changed), strict=True)
        )
        assert torch.equal(a[W:], b[W:])
        # and the first one inside it has: the test would notice a window that is too narrow
        assert not torch.equal(a[W - 1], b[W - 1])


def test_left_padding_is_invisible():
    model = random_model(windows=(W, None))
    (prompt,) = random_prompts([12])
    logits = []
    for padding in ([3, 3, 3], [7, 1, 30]):
        cache = poison(model.new_cache(1, 20, page_size=4))
        cache.starts[0] = len(padding)
        padded = [padding + prompt]
        feed(model, cache, padded, [len(padding) + 5])
        logits.append(torch.cat([feed(model, cache, padded, [1])[0] for _ in range(7)]))
    assert logits[0].isfinite().all()
    assert torch.equal(*logits)


@pytest.mark.parametrize("rolled_back", [1, 3])
def test_rollback_within_the_lookahead(rolled_back):
    model = random_model(windows=(W, None))
    prompt, wrong = random_prompts([20, 20])
    expected = feed(model, None, [prompt], [20])[0]
    cache = poison(model.new_cache(1, 24, lookahead=3, page_size=2))
    feed(model, cache, [prompt], [14])
    draft = [prompt[:14] + wrong[14 : 14 + rolled_back]]
    feed(model, cache, draft, [rolled_back])
    cache.rollback(rolled_back)
    rest = feed_all(model, cache, [prompt], [[1], [1], [4]])[0]
    assert error(rest, expected[14:]).within(FLOAT64)
