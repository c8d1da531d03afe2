"""decode_attention's CUDA kernel on the host emulator: keys in one split and in many.

Scenes are those of the Triton kernel's tests; `test_decode_attention_emulated.py` runs these under
sanitizers, too.
"""

from dataclasses import replace

import emulated_decode
import pytest
import ring
import torch
from emulated_decode import decode, kernel, poisoned_workspace
from emulator.host_build import emulated_core, missing
from emulator.orders import ORDERS, ordered
from scene import make_step
from shapes import Chunk, Heads
from test_decode_attention import check, check_ring
from test_decode_attention_interpreted import LONG, assert_same_results, copied, counters, fine
from tolerance import assert_same

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
emulated, many_splits = emulated_decode.emulated, emulated_decode.many_splits  # fixtures
DTYPES = (torch.bfloat16, torch.float16)
# Tiles of 64 keys: five splits of one or two, the window's edge within a tile and on one.
MANY = (
    Chunk("no window", (63, 64, 129, 430), (1,) * 4, None, 448, 1),
    Chunk("a window of tiles", (320, 383, 384, 700), (1,) * 4, 256, 16, 17),
    Chunk("a window inside tiles", (100, 257, 300, 511), (1,) * 4, 199, 112, 2, (3, 80, 301, 400)),
)
WIDE = MANY[1]


@pytest.mark.parametrize(
    ("dtype", "layout"), [*zip(DTYPES, ring.PAGE_LAYOUTS, strict=True)], ids=str
)
@pytest.mark.parametrize("chunk", MANY, ids=lambda chunk: chunk.name)
def test_one_split_and_many(chunk, dtype, layout, monkeypatch):
    scene = make_step(chunk, heads=Heads(4, 2, 64), dtype=dtype, layout=layout)
    whole, before, qkv = copied(scene), scene.ring.copy(), scene.qkv.clone()
    check(whole, decode(whole), before)
    cut = kernel.plan
    monkeypatch.setattr(kernel, "plan", lambda *how: fine(cut, *how))
    check(scene, decode(scene), before)
    assert_same(scene.qkv, qkv, "qkv")


@pytest.mark.parametrize("chunk", (LONG, *MANY), ids=lambda chunk: chunk.name)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(chunk, many_splits):
    scene = make_step(chunk, heads=Heads(10, 1, 64), dtype=torch.bfloat16)
    expected_scene = copied(scene)
    expected = decode(expected_scene)
    for order in ORDERS:
        for seed in range(2 if order in ("shuffled", "interleaved") else 1):
            again = copied(scene)
            with ordered(emulated_core().__file__, order, seed):
                result = decode(again)
            assert_same_results(result, expected, f"{order} {seed}")
            check_ring(again.ring, expected_scene.ring)


@pytest.mark.parametrize("position", [10, 63, 64, 190])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_nan_of_any_split_shows(cache, position, many_splits):
    scene = make_step(Chunk("nan", (200,), (1,), None, 208, 1), dtype=torch.float16)
    page, row = scene.ring.place(0, position)
    getattr(scene.ring, cache)[page, row, 0, 3] = torch.nan
    out, _ = decode(scene)
    assert out[0, :2].isnan().any(1).all(), "the heads of kv head 0"
    assert not out[0, 2:].isnan().any(), "the others"


@pytest.mark.parametrize("context", [3, 200])
def test_keys_of_weight_0_only(context, many_splits):
    chunk = Chunk("far away", (context,), (1,), None, 256, 1)
    scene = make_step(chunk, dtype=torch.bfloat16)
    scene.ring.k_cache.fill_(-torch.inf)
    _, k, _ = scene.parts()
    ones = torch.ones_like(scene.parts()[0])
    out, lse = decode(scene, q=ones, k=torch.full_like(k, -torch.inf))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_a_workspace_serves_calls_of_any_size_in_turn(many_splits):
    wide = make_step(WIDE, heads=Heads(4, 2, 64), dtype=torch.bfloat16)
    two = Chunk("two", (70, 300), (1, 1), None, 304, 1)
    narrow = make_step(two, heads=Heads(12, 1, 40), dtype=torch.float16)
    workspace = poisoned_workspace(100_000)
    for scene in (narrow, wide, wide, narrow, wide):
        expected = decode(copied(scene), workspace=None)  # the op makes its own
        result = decode(copied(scene), workspace=workspace)
        assert_same_results(result, expected, f"batch {len(scene.qkv)}")
        assert not counters(workspace).any(), "the counters wrap to 0"
        assert (workspace[-100_000 * 31 // 32 :] != 255).any(), "partials went elsewhere"


def test_counters_count(many_splits):
    # A counter that is one ahead lets the block before the last reduce: this must show.
    scene = make_step(
        Chunk("one", (270,), (1,), None, 288, 1), heads=Heads(1, 1, 16), dtype=torch.bfloat16
    )
    expected = decode(copied(scene))
    workspace = torch.zeros(40_000, dtype=torch.uint8)
    counters(workspace)[0] = 1
    out, _ = decode(copied(scene), workspace=workspace)
    assert not torch.equal(out, expected[0])
    assert counters(workspace)[0] == 1, "the newest split counted after the reduction"


def test_bits_do_not_depend_on_capacity_or_neighbours(many_splits):
    chunk = Chunk("wraps", (140, 277, 320), (1, 1, 1), 150, 32, 5)
    scene = make_step(chunk, heads=Heads(2, 1, 16), dtype=torch.bfloat16)
    for batch_invariant in (False, True):
        how = {"batch_invariant": batch_invariant}
        expected = decode(copied(scene), **how)
        other = ring.empty_ring(3, 11, 16, 1, 16, dtype=torch.bfloat16, layout="token-major")
        for b, context in enumerate(chunk.context_lens):
            first = max(0, context - 149)
            other.fill(b, scene.past_k[b], scene.past_v[b], first, context)
            other.place(b, context)
        assert_same_results(decode(replace(scene, ring=other), **how), expected, "other ring")
    alone = decode(
        copied(scene),
        **{name: x[1:2] for name, x in zip("qkv", scene.parts(), strict=True)},
        block_table=scene.ring.block_table[1:2],
        positions=scene.int32([277]),
        **how,
    )
    assert_same_results(alone, [x[1:2] for x in expected], "alone")


def test_batch_invariance_with_the_splits_that_are_shipped():
    chunk = Chunk("long", (700, 30), (1, 1), 600, 16, 38)
    scene = make_step(chunk, heads=Heads(4, 1, 64), dtype=torch.bfloat16)
    expected = decode(copied(scene), batch_invariant=True)
    for b, context in enumerate(chunk.context_lens):
        alone = decode(
            copied(scene),
            **{name: x[b : b + 1] for name, x in zip("qkv", scene.parts(), strict=True)},
            block_table=scene.ring.block_table[b : b + 1],
            positions=scene.int32([context]),
            batch_invariant=True,
        )
        assert_same_results(alone, [x[b : b + 1] for x in expected], f"sequence {b} alone")


def test_already_in_the_cache(many_splits):
    scene = make_step(WIDE, heads=Heads(4, 2, 64), dtype=torch.bfloat16)
    apart = copied(scene)
    together = decode(scene)
    before = scene.ring.copy()
    for b, position in enumerate(WIDE.context_lens):
        apart.ring.write(b, position, *(part[b] for part in apart.parts()[1:]))
    assert_same_results(decode(apart, k=None, v=None), together, "already written")
    check_ring(apart.ring, before)


def test_a_small_workspace_is_refused(many_splits):
    scene = make_step(LONG, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"decode_attention: workspace .* 112"):
        decode(scene, workspace=torch.zeros(112, dtype=torch.uint8))
