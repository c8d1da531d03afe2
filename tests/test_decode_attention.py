"""decode_attention against a float64 loop over keys, on every backend."""

import functools
from dataclasses import replace

import oracle
import peer
import pytest
import ring
import shapes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import SMALL, Scene, make_scene, make_step, rope_tables
from shapes import Chunk, Heads
from tolerance import assert_close, assert_same
from torch import Tensor

OP = "decode_attention"
QUANTISED = (torch.int8, torch.float8_e4m3fn)
WRAPS = shapes.STEPS[0]


def check(scene: Scene, result: tuple[Tensor, Tensor], before: ring.Ring, **how) -> None:
    """Compare both outputs with the oracle, and the ring with one written by it, bit for bit."""
    check_outputs(result, scene, scene, **how)
    _, k, v = scene.parts()
    expected = before.copy()
    for b, position in enumerate(scene.chunk.context_lens):
        expected.write(b, position, k[b], v[b])
    check_ring(scene.ring, expected)


def check_outputs(result: tuple[Tensor, Tensor], plain: Scene, exact: Scene, **how) -> None:
    for name, got, peers, right in zip(
        ("out", "lse"),
        result,
        plain.plain(stored_first=True, **how),
        exact.exact(stored_first=True, **how),
        strict=True,
    ):
        assert got.is_contiguous()
        assert_close(got, peers, right, name)
    assert result[0].dtype == plain.qkv.dtype and result[1].dtype == torch.float32


def check_ring(got: ring.Ring, expected: ring.Ring) -> None:
    assert_same(got.k_cache, expected.k_cache, "k_cache")
    assert_same(got.v_cache, expected.v_cache, "v_cache")
    assert_same(got.block_table, expected.block_table, "block_table")


def rotated(scene: Scene, turn, **how) -> Scene:
    """Return the scene with the new q and k turned; q_scale multiplies q alone."""
    q, k, v = scene.parts()
    q_scale = how.pop("q_scale")
    turned = turn(q, q_scale=q_scale, **how), turn(k, q_scale=None, **how)
    return replace(scene, qkv=torch.cat((*turned, v), 1))


def exact_rope(x: Tensor, *, cos, sin, positions, interleaved, q_scale) -> Tensor:
    """`oracle.rope` of tensors."""
    cos, sin = oracle.f64(cos), oracle.f64(sin)
    q_scale = None if q_scale is None else oracle.f64(q_scale)
    how = {"interleaved": interleaved, "q_scale": q_scale}
    rotated = oracle.rope(oracle.f64(x), cos, sin, positions.tolist(), **how)
    return torch.from_numpy(rotated).to(x.device)


@pytest.mark.parametrize(("chunk", "layout"), ring.in_turns(shapes.STEPS))
def test_step(chunk, layout, dtype, backend, device):
    scene = make_step(chunk, dtype=dtype, device=device, layout=layout)
    before, qkv = scene.ring.copy(), scene.qkv.clone()
    check(scene, scene.decode(backend=backend), before)
    assert_same(scene.qkv, qkv, "qkv")


@pytest.mark.parametrize("heads", shapes.HEADS, ids=str)
def test_heads(heads, dtype, backend, device):
    scene = make_step(WRAPS, heads=heads, dtype=dtype, device=device)
    check(scene, scene.decode(backend=backend), scene.ring.copy())


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "q_scale"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
def test_rotates_in_the_same_call(interleaved, scaled, dtype, backend, device):
    scene = make_step(WRAPS, dtype=dtype, device=device)
    how = {**rope_tables(16, dtype, device), "interleaved": interleaved}
    if not scaled:
        how["q_scale"] = None
    before, qkv = scene.ring.copy(), scene.qkv.clone()
    result = scene.decode(**how, backend=backend)
    assert_same(scene.qkv, qkv, "qkv")
    how["positions"] = scene.int32(WRAPS.context_lens)
    exact, plain = rotated(scene, exact_rope, **how), rotated(scene, peer.rope, **how)
    check_outputs(result, plain, exact)
    for b, position in enumerate(WRAPS.context_lens):
        page, row = before.place(b, position)
        written = scene.ring.k_cache[page, row]
        assert_close(written, plain.parts()[1][b], exact.parts()[1][b], "rotated k")
        before.write(b, position, written, scene.parts()[2][b])
    check_ring(scene.ring, before)


def test_already_in_the_cache(dtype, backend, device):
    scene = make_step(WRAPS, dtype=dtype, device=device)
    apart = replace(scene, ring=scene.ring.copy())
    together = scene.decode(backend=backend)
    _, k, v = apart.parts()
    for b, position in enumerate(WRAPS.context_lens):
        apart.ring.write(b, position, k[b], v[b])
    before = apart.ring.copy()
    for name, got, want in zip(
        ("out", "lse"), apart.decode(k=None, v=None, backend=backend), together, strict=True
    ):
        assert_same(got, want, name)
    check_ring(apart.ring, before)


def test_idle_rows(dtype, backend, device):
    scene = make_step(WRAPS, dtype=dtype, device=device)
    expected_ring = scene.ring.copy()
    full_out, full_lse = replace(scene, ring=scene.ring.copy()).decode(backend=backend)
    idle = [1, 3, 4, 7]
    live = [0, 2, 5, 6]
    scene.qkv[idle] = torch.nan
    scene.ring.block_table[idle] = -1
    expected_ring.block_table[idle] = -1
    positions = scene.int32([-1 if b in idle else p for b, p in enumerate(WRAPS.context_lens)])
    how = rope_tables(16, dtype, device) if dtype == torch.float32 else {}
    out, lse = scene.decode(positions=positions, backend=backend)
    assert (out[idle] == 0).all() and (lse[idle] == -torch.inf).all()
    assert_same(out[live], full_out[live], "out of live rows")
    assert_same(lse[live], full_lse[live], "lse of live rows")
    for b in live:
        expected_ring.write(b, WRAPS.context_lens[b], *(part[b] for part in scene.parts()[1:]))
    check_ring(scene.ring, expected_ring)
    out, lse = scene.decode(positions=scene.int32([-1] * 8), **how, backend=backend)
    assert (out == 0).all() and (lse == -torch.inf).all()
    check_ring(scene.ring, expected_ring)


def test_no_sequences(backend, device):
    scene = make_scene(Chunk("nobody", (), (), 8, 4, 2), device=device)
    out, lse = scene.decode(backend=backend)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_scale(backend, device):
    scene = make_step(WRAPS, device=device)
    for scale in (0.7, 300.0):
        result = scene.decode(scale=scale, backend=backend)
        check_outputs(result, scene, scene, scale=scale)


@pytest.mark.parametrize("scales", [1, 2], ids=["one scale", "scale a head"])
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_quantised_cache_attends_what_it_stored(cache_dtype, scales, dtype, backend, device):
    scene = make_step(
        WRAPS, dtype=dtype, device=device, cache_dtype=cache_dtype,
        k_scale=torch.tensor([0.02, 0.031][:scales], device=device),
        v_scale=torch.tensor([0.03, 0.011][:scales], device=device),
    )  # fmt: skip
    check(scene, scene.decode(backend=backend), scene.ring.copy())


@pytest.mark.parametrize("position", range(15))
def test_a_key_counts_exactly_if_the_window_holds_it(position, dtype, backend, device):
    # The token at 14 sees 10-14; the ring of 12 still holds 3-14.
    scene = make_step(Chunk("influence", (14,), (1,), 5, 4, 3), dtype=dtype, device=device)
    before = scene.ring.copy()
    expected = scene.decode(backend=backend)
    for value in (9.0, torch.nan, torch.inf):
        changed = replace(scene, ring=before.copy(), qkv=scene.qkv.clone())
        if position == 14:
            changed.parts()[1][0], changed.parts()[2][0] = value, value
        elif position > 2:
            row = torch.full_like(scene.past_k[0][0], value)
            changed.ring.write(0, position, row, row)
        result = changed.decode(backend=backend)
        if position >= 10:
            assert not torch.equal(result[0], expected[0]), f"key {position} is in the window"
        else:
            assert_same(result[0], expected[0], "out")
            assert_same(result[1], expected[1], "lse")


def test_result_does_not_depend_on_capacity_pages_or_order(dtype, backend, device):
    chunk = Chunk("shapes of a ring", (21, 5, 0), (1, 1, 1), 8, 4, 2)
    scene = make_step(chunk, dtype=dtype, device=device)
    before = scene.ring.copy()
    expected = replace(scene, ring=before).decode(backend=backend)
    for page_size, pages_per_seq, layout in (
        (8, 1, "token-major"),
        (4, 7, "head-major"),
        (32, 1, "head-major"),
    ):
        kind = {"dtype": dtype, "device": device, "layout": layout}
        other = ring.empty_ring(3, pages_per_seq, page_size, 2, 16, **kind)
        for b, context in enumerate(chunk.context_lens):
            other.fill(b, scene.past_k[b], scene.past_v[b], 0, context)
            other.place(b, context)
        for name, got, want in zip(
            ("out", "lse"),
            replace(scene, ring=other).decode(backend=backend),
            expected,
            strict=True,
        ):
            assert_same(got, want, f"{name} with pages of {page_size}")


def test_batch_invariant_repeatable_and_with_a_workspace(dtype, backend, device):
    scene = make_step(WRAPS, dtype=dtype, device=device)
    workspace = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    run = functools.partial(scene.decode, batch_invariant=True, backend=backend)
    whole = run()
    for _ in range(2):  # twice: what the first call leaves in the workspace must not matter
        for name, got, want in zip(("out", "lse"), run(workspace=workspace), whole, strict=True):
            assert_same(got, want, f"{name} again")
    for b, context in enumerate(WRAPS.context_lens):
        q, k, v = (part[b : b + 1] for part in scene.parts())
        table, positions = scene.ring.block_table[b : b + 1], scene.int32([context])
        single = run(q=q, k=k, v=v, block_table=table, positions=positions)
        for name, got, want in zip(("out", "lse"), single, whole, strict=True):
            assert_same(got, want[b : b + 1], f"{name} of sequence {b} alone")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    contexts=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    window=st.one_of(st.none(), st.integers(1, 24)),
    page_size=st.sampled_from([1, 3, 4, 16]),
    spare=st.integers(0, 2),
    heads=st.sampled_from([SMALL, Heads(3, 1, 16), Heads(2, 2, 32)]),
)
def test_drawn_shapes(contexts, window, page_size, spare, heads):
    pages_per_seq = -(-(window or max(contexts) + 1) // page_size) + spare
    ones = (1,) * len(contexts)
    chunk = Chunk("drawn", tuple(contexts), ones, window, page_size, pages_per_seq)
    scene = make_step(chunk, heads=heads)
    check(scene, scene.decode(), scene.ring.copy())
