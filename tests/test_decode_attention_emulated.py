"""The shipped csrc/cuda/decode_attention.cu on the host emulator, plainly and under sanitizers.

The op's CUDA cell runs in place of its CPU cell, so a call takes the way it takes on a GPU: checks,
refusals, the cut into splits, the launch. Scenes are those of the Triton kernel's tests.
"""

import importlib
from dataclasses import replace

import peer
import pytest
import ring
import scene as scenes
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing, run_tests_sanitized
from emulator.orders import ORDERS, ordered
from scene import make_step, rope_tables
from shapes import Chunk, Heads
from test_decode_attention import check, check_outputs, check_ring, exact_rope, rotated
from test_decode_attention_interpreted import (
    CONTEXTS,
    EDGES,
    LONG,
    assert_same_results,
    copied,
    counters,
    fine,
)
from tolerance import assert_same

from mistral_kernels import ops
from mistral_kernels.kernels import decode_attention as kernel
from mistral_kernels.ops import dispatch

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
DTYPES = (torch.bfloat16, torch.float16)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
# Tiles of 64 keys: five splits of one or two, the window's edge within a tile and on one.
MANY = (
    Chunk("no window", (63, 64, 129, 430), (1,) * 4, None, 448, 1),
    Chunk("a window of tiles", (320, 383, 384, 700), (1,) * 4, 256, 16, 17),
    Chunk("a window inside tiles", (100, 257, 300, 511), (1,) * 4, 199, 112, 2, (3, 80, 301, 400)),
)
WIDE = MANY[1]


CELL = importlib.import_module("mistral_kernels.ops.decode_attention")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Makes backend "cpu" of the op its CUDA cell on the emulator."""
    dispatch.choose.cache_clear()
    monkeypatch.setattr(CELL, "native_extension", emulated_core)
    monkeypatch.setattr(CELL, "cuda_queue", lambda device: (0, 0))
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    row = dispatch.OPS["decode_attention"]
    monkeypatch.setitem(row, "cpu", row["cuda"])
    yield
    dispatch.choose.cache_clear()


@pytest.fixture
def many_splits(monkeypatch):
    """Splits of one tile at least, up to five of a sequence."""
    cut = kernel.plan
    monkeypatch.setattr(kernel, "plan", lambda *how: fine(cut, *how))


def decode(scene, **how):
    """Runs the op on copies between guard bands; the scene's ring and workspace are written."""
    q, k, v = scene.parts()
    call = {"q": q, "k": k, "v": v, "positions": scene.int32(scene.chunk.context_lens)}
    call |= {**scene.ring.arguments(), **scene.visibility(), **how}
    written = [name for name in ("k_cache", "v_cache", "workspace") if call.get(name) is not None]
    with GuardBands() as guard, pytest.MonkeyPatch.context() as patch:
        shape = call["q"].shape
        outputs = guard.output(shape, q.dtype), guard.output(shape[:2], torch.float32)
        patch.setattr(CELL, "empty_outputs", lambda *_: outputs)
        guarded = {
            name: guard(value, mutated=name in written) if torch.is_tensor(value) else value
            for name, value in call.items()
        }
        out, lse = ops.decode_attention(**guarded, backend="cpu")
        result = out.clone(), lse.clone()
        for name in written:
            call[name].copy_(guarded[name])
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", EDGES, ids=lambda chunk: chunk.name)
def test_edges_of_tiles_windows_and_rings(chunk, dtype, many_splits):
    scene = make_step(chunk, heads=Heads(3, 1, 24), dtype=dtype)
    check(scene, decode(scene), scene.ring.copy())


@pytest.mark.parametrize(("dtype", "layout"), zip(DTYPES, ring.PAGE_LAYOUTS, strict=True), ids=str)
@pytest.mark.parametrize("chunk", MANY, ids=lambda chunk: chunk.name)
def test_one_split_and_many(chunk, dtype, layout, monkeypatch):
    scene = make_step(chunk, heads=Heads(4, 2, 64), dtype=dtype, layout=layout)
    whole, before, qkv = copied(scene), scene.ring.copy(), scene.qkv.clone()
    check(whole, decode(whole), before)
    cut = kernel.plan
    monkeypatch.setattr(kernel, "plan", lambda *how: fine(cut, *how))
    check(scene, decode(scene), before)
    assert_same(scene.qkv, qkv, "qkv")


@pytest.mark.parametrize(
    "heads",
    [Heads(2, 2, 16), Heads(4, 2, 32), Heads(5, 1, 80), Heads(6, 1, 128), Heads(7, 1, 200)]
    + [Heads(8, 1, 256), Heads(9, 1, 64), Heads(12, 1, 128), Heads(16, 1, 64), Heads(34, 2, 8)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads(heads, dtype, many_splits):
    scene = make_step(Chunk("two", (140, 17), (1, 1), None, 160, 1), heads=heads, dtype=dtype)
    check(scene, decode(scene), scene.ring.copy())


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "q_scale"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotates_and_writes_in_the_newest_split_only(
    dtype, interleaved, scaled, many_splits, monkeypatch
):
    monkeypatch.setattr(scenes, "MAX_POSITIONS", 300)
    chunk = Chunk("rotated", (259, 17), (1, 1), None, 272, 1)
    scene = make_step(chunk, heads=Heads(4, 2, 80), dtype=dtype)
    how = {**rope_tables(80, dtype, "cpu"), "interleaved": interleaved}
    if not scaled:
        how["q_scale"] = None
    before = scene.ring.copy()
    result = decode(scene, **how)
    how["positions"] = scene.int32(chunk.context_lens)
    exact, plain = rotated(scene, exact_rope, **how), rotated(scene, peer.rope, **how)
    check_outputs(result, plain, exact)
    for b, position in enumerate(chunk.context_lens):
        page, row = before.place(b, position)
        before.write(b, position, scene.ring.k_cache[page, row], scene.parts()[2][b])
    check_ring(scene.ring, before)


@pytest.mark.parametrize(("dtype", "scales"), zip(DTYPES, (1, 2), strict=True), ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_quantised_cache_attends_what_it_stored(dtype, cache_dtype, head_dim, scales, many_splits):
    kind = {"k_scale": torch.tensor([0.02, 0.031][:scales])}
    kind |= {"v_scale": torch.tensor([0.03, 0.011][:scales])}
    chunk = Chunk("two", (150, 20), (1, 1), 90, 96, 1)
    heads = Heads(2, 2, head_dim)
    scene = make_step(chunk, heads=heads, dtype=dtype, cache_dtype=cache_dtype, **kind)
    check(scene, decode(scene), scene.ring.copy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_every_code_is_widened_as_torch_does(cache_dtype, dtype):
    # 64 sequences of one token; the key of each has one dimension that is not 0.
    values = ring.codes(cache_dtype).view(4, 64)
    diagonal = torch.eye(64, dtype=torch.bool)[:, None].expand(64, 4, 64)
    keys = torch.where(diagonal, values.float(), 0.0).to(cache_dtype)
    call = {"positions": torch.zeros(64, dtype=torch.int32), "backend": "cpu"}
    call |= {"block_table": torch.arange(64, dtype=torch.int32)[:, None]}
    one = torch.ones(1)
    results = []
    for kind, scales in ((cache_dtype, {"k_scale": one, "v_scale": one}), (dtype, {})):
        caches = [torch.zeros(64, 16, 4, 64).to(kind) for _ in range(2)]
        caches[0][:, 0], caches[1][:, 0] = keys.to(kind), values.to(kind)
        q = torch.ones(64, 4, 64, dtype=dtype)
        results.append(ops.decode_attention(q, None, None, *caches, **call, **scales))
    # The only key has weight 1, so the values come out as they are, unless it is NaN itself.
    lost = keys.float().isnan().any(-1, keepdim=True)
    out = torch.where(lost, torch.nan, values.float()).to(dtype)
    for got, want in ((results[0][0], out), (results[0][1], results[1][1])):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_already_in_the_cache(many_splits):
    scene = make_step(WIDE, heads=Heads(4, 2, 64), dtype=torch.bfloat16)
    apart = copied(scene)
    together = decode(scene)
    before = scene.ring.copy()
    for b, position in enumerate(WIDE.context_lens):
        apart.ring.write(b, position, *(part[b] for part in apart.parts()[1:]))
    assert_same_results(decode(apart, k=None, v=None), together, "already written")
    check_ring(apart.ring, before)


@pytest.mark.parametrize("chunk", (LONG, *MANY), ids=lambda chunk: chunk.name)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(chunk, many_splits):
    scene = make_step(chunk, heads=Heads(10, 1, 64), dtype=torch.bfloat16)
    workspace = torch.zeros(200_000, dtype=torch.uint8)
    expected_scene = copied(scene)
    expected = decode(expected_scene, workspace=workspace)
    for order in ORDERS:
        for seed in range(2 if order in ("shuffled", "interleaved") else 1):
            again = copied(scene)
            with ordered(emulated_core().__file__, order, seed):
                result = decode(again, workspace=workspace)
            assert_same_results(result, expected, f"{order} {seed}")
            check_ring(again.ring, expected_scene.ring)
            assert not counters(workspace).any(), "the counters wrap to 0"


def test_idle_rows_and_a_table_of_larger_rows(many_splits):
    scene = make_step(LONG, heads=Heads(18, 2, 64), dtype=torch.bfloat16)
    expected_ring = scene.ring.copy()
    expected = decode(copied(scene))
    idle, live = [0, 3, 6], [1, 2, 4, 5]
    table = torch.full((7, 5), 99, dtype=torch.int32)
    table[:, 1:3] = scene.ring.block_table
    table[idle] = -1
    scene.qkv[idle] = torch.nan
    positions = scene.int32([-1 if b in idle else p for b, p in enumerate(CONTEXTS)])
    out, lse = decode(scene, positions=positions, block_table=table[:, 1:3])
    assert (out[idle] == 0).all() and (lse[idle] == -torch.inf).all()
    assert_same_results((out[live], lse[live]), [x[live] for x in expected], "live rows")
    for b in live:
        expected_ring.write(b, CONTEXTS[b], *(part[b] for part in scene.parts()[1:]))
    check_ring(scene.ring, expected_ring)


def test_no_sequences():
    scene = scenes.make_scene(Chunk("nobody", (), (), 8, 16, 2), dtype=torch.bfloat16)
    out, lse = decode(scene)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


@pytest.mark.parametrize("context", [3, 200])
def test_keys_of_weight_0_only(context, many_splits):
    chunk = Chunk("far away", (context,), (1,), None, 256, 1)
    scene = make_step(chunk, dtype=torch.bfloat16)
    scene.ring.k_cache.fill_(-torch.inf)
    _, k, _ = scene.parts()
    ones = torch.ones_like(scene.parts()[0])
    out, lse = decode(scene, q=ones, k=torch.full_like(k, -torch.inf))
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("position", [10, 63, 64, 190])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_nan_of_any_split_shows(cache, position, many_splits):
    scene = make_step(Chunk("nan", (200,), (1,), None, 208, 1), dtype=torch.float16)
    page, row = scene.ring.place(0, position)
    getattr(scene.ring, cache)[page, row, 0, 3] = torch.nan
    out, _ = decode(scene)
    assert out[0, :2].isnan().any(1).all(), "the heads of kv head 0"
    assert not out[0, 2:].isnan().any(), "the others"


def test_a_workspace_serves_calls_of_any_size_in_turn(many_splits):
    wide = make_step(WIDE, heads=Heads(4, 2, 64), dtype=torch.bfloat16)
    two = Chunk("two", (70, 300), (1, 1), None, 304, 1)
    narrow = make_step(two, heads=Heads(12, 1, 40), dtype=torch.float16)
    workspace = torch.full((100_000,), 255, dtype=torch.uint8)  # NaN where partials go
    counters(workspace).zero_()
    for scene in (narrow, wide, wide, narrow, wide):
        expected = decode(copied(scene))
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


def test_a_small_workspace_is_refused(many_splits):
    scene = make_step(LONG, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"decode_attention: workspace .* 112"):
        decode(scene, workspace=torch.zeros(112, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("fact", "value", "why"),
    [
        ("head_dim", 264, "264"),
        ("head_dim", 36, "36"),
        ("page_size", 24, "24"),
        ("aligned", 0, "16 bytes"),
    ],
)
def test_the_backend_says_what_it_does_not_take(fact, value, why):
    facts = ((fact, value),)
    call = {"device_type": "cuda", "dtype": torch.bfloat16, "facts": facts, "backend": "cuda"}
    with pytest.raises(ValueError, match=f"decode_attention: .*{why}"):
        dispatch.choose("decode_attention", **call)
    assert dispatch.choose("decode_attention", **call | {"backend": "auto"}) != "cuda"


def test_misaligned_rows_are_seen():
    scene = make_step(EDGES[4], heads=Heads(3, 1, 24), dtype=torch.bfloat16)
    wide = torch.zeros(*scene.ring.k_cache.shape[:3], 25).to(torch.bfloat16)
    odd = replace(scene.ring, k_cache=wide[..., :24])
    with pytest.raises(ValueError, match="16 bytes"):
        decode(replace(scene, ring=odd))
    with pytest.raises(ValueError, match="16 bytes"):
        decode(scene, workspace=torch.zeros(9000, dtype=torch.uint8)[1:])


def test_under_address_and_undefined_behaviour_sanitizers():
    run_tests_sanitized(__file__)
