"""prefill_attention against a float64 loop over queries and keys, on every backend."""

import functools
from dataclasses import replace

import pytest
import ring
import shapes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import SMALL, Scene, make_scene
from shapes import Chunk, Heads
from tolerance import assert_close, assert_same

OP = "prefill_attention"
QUANTISED = (torch.int8, torch.float8_e4m3fn)
# Cache-less: a sequence of 0 tokens between others, and one of a single token.
RAGGED = (9, 0, 5, 1)
WRAPS = Chunk("wraps", (6, 14), (3, 4), 8, 4, 2)


def alone(window: int | None, seqlens: tuple[int, ...] = RAGGED) -> Chunk:
    """Sequences without a past."""
    return Chunk("alone", (0,) * len(seqlens), seqlens, window, 16, 1)


def check(scene: Scene, result: tuple[torch.Tensor, torch.Tensor], **how) -> None:
    """Compare both outputs with the oracle."""
    for name, got, plain, exact in zip(
        ("out", "lse"), result, scene.plain(**how), scene.exact(**how), strict=True
    ):
        assert got.is_contiguous()
        assert_close(got, plain, exact, name)
    assert result[0].dtype == scene.qkv.dtype and result[1].dtype == torch.float32


@pytest.mark.parametrize(("chunk", "layout"), ring.in_turns(shapes.CHUNKS))
def test_ring_and_new_keys(chunk, layout, dtype, backend, device):
    scene = make_scene(chunk, dtype=dtype, device=device, layout=layout)
    before = scene.ring.copy(), scene.qkv.clone()
    check(scene, scene.prefill(backend=backend))
    assert_same(scene.ring.k_cache, before[0].k_cache, "k_cache")
    assert_same(scene.ring.v_cache, before[0].v_cache, "v_cache")
    assert_same(scene.qkv, before[1], "qkv")


@pytest.mark.parametrize("heads", shapes.HEADS, ids=str)
def test_heads(heads, dtype, backend, device):
    scene = make_scene(WRAPS, heads=heads, dtype=dtype, device=device)
    check(scene, scene.prefill(backend=backend))
    scene = make_scene(alone(4), heads=heads, dtype=dtype, device=device)
    check(scene, scene.prefill_alone(backend=backend))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9, 10, None])
def test_windows_without_a_cache(window, dtype, backend, device):
    scene = make_scene(alone(window), dtype=dtype, device=device)
    check(scene, scene.prefill_alone(backend=backend))


def test_long_sequence_crosses_tiles(dtype, backend, device):
    scene = make_scene(alone(100, (300,)), heads=Heads(2, 1, 16), dtype=dtype, device=device)
    check(scene, scene.prefill_alone(backend=backend))


def test_starts_without_a_cache(backend, device):
    scene = make_scene(alone(4)._replace(starts=(3, 0, 9, 0)), device=device)
    out, lse = scene.prefill_alone(backend=backend)
    check(scene, (out, lse))
    assert (out[9:14] == 0).all() and (lse[9:14] == -torch.inf).all(), "no key to see"


def test_every_key_is_seen_without_a_mask(dtype, backend, device):
    scene = make_scene(alone(None), dtype=dtype, device=device)
    check(scene, scene.prefill_alone(causal=False, backend=backend), causal=False)


def test_scale(backend, device):
    scene = make_scene(WRAPS, device=device)
    check(scene, scene.prefill(scale=0.7, backend=backend), scale=0.7)


def test_large_scores_do_not_overflow(backend, device):
    scene = make_scene(WRAPS, device=device)
    check(scene, scene.prefill(scale=300.0, backend=backend), scale=300.0)


def test_a_ring_narrower_than_the_window_attends_what_it_holds(backend, device):
    for window in (None, 20):
        scene = make_scene(Chunk("narrow", (14, 3), (5, 2), window, 4, 2), device=device)
        check(scene, scene.prefill(backend=backend))


@pytest.mark.parametrize("scales", [1, 2], ids=["one scale", "scale a head"])
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_quantised_cache(cache_dtype, scales, dtype, backend, device):
    scene = make_scene(
        WRAPS, dtype=dtype, device=device, cache_dtype=cache_dtype,
        k_scale=torch.tensor([0.02, 0.031][:scales], device=device),
        v_scale=torch.tensor([0.03, 0.011][:scales], device=device),
    )  # fmt: skip
    check(scene, scene.prefill(backend=backend))


def test_packed_sequences_never_see_each_other(backend, device):
    scene = make_scene(alone(None, (6, 5)), device=device)
    for how in ({}, {"causal": False}):
        out, lse = scene.prefill_alone(**how, backend=backend)
        other = replace(scene, qkv=scene.qkv.clone())
        other.qkv[6:] = torch.nan
        changed, changed_lse = other.prefill_alone(**how, backend=backend)
        assert_same(changed[:6], out[:6], "out of the first")
        assert_same(changed_lse[:6], lse[:6], "lse of the first")
        assert changed[6:].isnan().all(), "the second sees its own NaN"


# Positions 0-8 are cached, 9-12 new; the ring of 12 still holds 0-8; the window is 5, so that no
# query sees 0-4.
INFLUENCE = Chunk("influence", (9,), (4,), 5, 4, 3)


@pytest.mark.parametrize("position", range(13))
def test_a_key_reaches_exactly_the_queries_whose_window_holds_it(position, dtype, backend, device):
    scene = make_scene(INFLUENCE, dtype=dtype, device=device)
    out, lse = scene.prefill(backend=backend)
    changed_out, changed_lse = make_changed(scene, position, 9.0).prefill(backend=backend)
    for row, query in enumerate(range(9, 13)):
        if query - 5 < position <= query:
            assert not torch.equal(changed_out[row], out[row]), f"query {query} sees key {position}"
        else:
            assert_same(changed_out[row], out[row], f"out of query {query}")
            assert_same(changed_lse[row], lse[row], f"lse of query {query}")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_poison_that_no_query_sees_has_no_effect(poison, dtype, backend, device):
    scene = make_scene(INFLUENCE, dtype=dtype, device=device)
    expected = scene.prefill(backend=backend)
    for position in range(5):
        scene = make_changed(scene, position, poison)
    for name, got, want in zip(
        ("out", "lse"), scene.prefill(backend=backend), expected, strict=True
    ):
        assert_same(got, want, name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_reference_leaves_out_what_a_query_masks(value, device):
    # A kernel may spread the NaN of a live key over its tile; the reference selects by query.
    scene = make_scene(INFLUENCE, device=device)
    out, _ = scene.prefill(backend="reference")
    for position in range(5, 13):
        changed, _ = make_changed(scene, position, value).prefill(backend="reference")
        for row, query in enumerate(range(9, 13)):
            if query - 5 < position <= query:
                assert not changed[row].isfinite().all()
            else:
                assert_same(changed[row], out[row], f"query {query}, key {position}")


def make_changed(scene: Scene, position: int, value: float) -> Scene:
    """Return the scene of one sequence with key and value at `position` replaced."""
    changed = replace(scene, qkv=scene.qkv.clone(), ring=scene.ring.copy())
    context = scene.chunk.context_lens[0]
    if position >= context:
        for part in changed.parts()[1:]:
            part[position - context] = value
    else:
        row = torch.full_like(scene.past_k[0][0], value)
        changed.ring.write(0, position, row, row)
    return changed


def test_result_does_not_depend_on_capacity_pages_or_order(dtype, backend, device):
    chunk = Chunk("shapes of a ring", (21, 5), (6, 9), 8, 4, 2)
    scene = make_scene(chunk, dtype=dtype, device=device)
    expected = scene.prefill(backend=backend)
    for page_size, pages_per_seq, layout in (
        (8, 1, "token-major"),
        (4, 7, "head-major"),
        (32, 1, "head-major"),
    ):
        other = ring.empty_ring(
            2, pages_per_seq, page_size, 2, 16, dtype=dtype, device=device, layout=layout
        )
        for b, context in enumerate(chunk.context_lens):
            other.fill(b, scene.past_k[b], scene.past_v[b], 0, context)
        result = replace(scene, ring=other).prefill(backend=backend)
        for name, got, want in zip(("out", "lse"), result, expected, strict=True):
            assert_same(got, want, f"{name} with pages of {page_size}")


def test_batch_invariant_and_repeatable(dtype, backend, device):
    chunk = Chunk("batch", (9, 0, 30, 6), (4, 7, 1, 0), 8, 4, 3)
    scene = make_scene(chunk, dtype=dtype, device=device)
    run = functools.partial(scene.prefill, backend=backend, batch_invariant=True)
    whole = run()
    for name, got, want in zip(("out", "lse"), run(), whole, strict=True):
        assert_same(got, want, f"{name} again")
    q, k, v = scene.parts()
    for b, (begin, end) in enumerate(zip(scene.offsets, scene.offsets[1:], strict=False)):
        single = run(
            q=q[begin:end], k=k[begin:end], v=v[begin:end],
            cu_seqlens=scene.int32([0, end - begin]),
            context_lens=scene.int32([chunk.context_lens[b]]),
            block_table=scene.ring.block_table[b : b + 1],
        )  # fmt: skip
        for name, got, want in zip(("out", "lse"), single, whole, strict=True):
            assert_same(got, want[begin:end], f"{name} of sequence {b} alone")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 24)),
    page_size=st.sampled_from([1, 3, 4, 16]),
    spare=st.integers(0, 2),
    heads=st.sampled_from([SMALL, Heads(3, 1, 16), Heads(2, 2, 32)]),
)
def test_drawn_shapes(sequences, window, page_size, spare, heads):
    context_lens, seqlens = zip(*sequences, strict=True)
    needed = window or max(c + t for c, t in sequences) or 1
    pages_per_seq = -(-needed // page_size) + spare
    chunk = Chunk("drawn", context_lens, seqlens, window, page_size, pages_per_seq)
    scene = make_scene(chunk, heads=heads)
    check(scene, scene.prefill())
