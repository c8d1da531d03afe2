"""decode_attention's Triton kernel in Triton's interpreter, cut into many small splits.

Tiles of 16 keys and splits of one or two of them, so that few keys cross every edge.
`test_decode_attention.py` and `test_decode_attention_splits.py` run the same backend there with
the tiles that are shipped.
"""

from dataclasses import replace

import peer
import pytest
import ring
import torch
from scene import Scene, make_step, rope_tables
from shapes import Chunk, Heads
from test_decode_attention import check, check_outputs, exact_rope, rotated
from tolerance import assert_same
from triton.runtime import interpreter

from mistral_kernels.kernels import key_splits

pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Positions around the edges of tiles and of pages; rings wrapped never, once and twice.
CONTEXTS = (0, 15, 16, 17, 33, 64, 97)
ONES = (1,) * len(CONTEXTS)
EDGES = (
    Chunk("window of one key", CONTEXTS, ONES, 1, 16, 1),
    Chunk("window just below a tile", CONTEXTS, ONES, 15, 16, 1),
    Chunk("window of a tile, the ring", CONTEXTS, ONES, 16, 16, 1),
    Chunk("window just above a tile", CONTEXTS, ONES, 17, 32, 1),
    Chunk("window of tiles, ring of pages", CONTEXTS, ONES, 48, 16, 3),
    Chunk("window cut by a page", CONTEXTS, ONES, 40, 48, 2),
    Chunk("window longer than all", CONTEXTS, ONES, 500, 64, 2),
    Chunk("no window, starts at edges", CONTEXTS, ONES, None, 16, 7, (0, 15, 17, 16, 32, 31, 96)),
    Chunk("starts hide the rest", CONTEXTS, ONES, 32, 16, 2, (1, 15, 20, 0, 33, 49, 65)),
)
LONG = EDGES[6]


@pytest.fixture
def kernel(monkeypatch):
    """The kernel's module, with tiles of 16 keys and splits of at least one."""
    from mistral_kernels.kernels import decode_attention as module

    tiles, cut = module.tile_config, module.plan
    monkeypatch.setattr(module, "tile_config", lambda *how: {**tiles(*how), "BLOCK_N": 16})
    monkeypatch.setattr(module, "plan", lambda *how: fine(cut, *how))
    return module


def fine(cut, pairs, width, block_n, slots):
    """`plan` with splits of one tile at least, and five of a sequence at most."""
    most = 5 if slots else 3
    tiles = -(-width // block_n) + 1
    return cut(pairs, width, block_n, slots)._replace(
        splits=min(most, tiles), most_splits=most, tiles_at_least=1
    )


def run_backwards(monkeypatch) -> None:
    """Run the programs of a head in reverse: the newest split comes first."""
    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: forwards(x, builder.grid_dim[1] - 1 - y, z)
    )


def copied(scene: Scene) -> Scene:
    return replace(scene, ring=scene.ring.copy())


def assert_same_results(got, expected, what: str) -> None:
    for name, one, other in zip(("out", "lse"), got, expected, strict=True):
        assert_same(one, other, f"{name}, {what}")


def counters(workspace: torch.Tensor) -> torch.Tensor:
    """The part of a workspace where no partial is ever written."""
    return workspace[: key_splits.counter_share(workspace.numel())].view(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", EDGES, ids=lambda chunk: chunk.name)
def test_edges_of_tiles_windows_and_rings(chunk, dtype, kernel):
    scene = make_step(chunk, heads=Heads(3, 1, 24), dtype=dtype)
    check(scene, scene.decode(backend="triton"), scene.ring.copy())


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotates_and_writes_in_the_newest_split_only(dtype, interleaved, kernel):
    chunk = Chunk("rotated", (38, 17), (1, 1), None, 48, 1)
    scene = make_step(chunk, heads=Heads(4, 2, 80), dtype=dtype)
    how = {**rope_tables(80, dtype, "cpu"), "interleaved": interleaved}
    before = scene.ring.copy()
    result = scene.decode(**how, backend="triton")
    how["positions"] = scene.int32(chunk.context_lens)
    exact, plain = rotated(scene, exact_rope, **how), rotated(scene, peer.rope, **how)
    check_outputs(result, plain, exact)
    for b, position in enumerate(chunk.context_lens):
        page, row = before.place(b, position)
        before.write(b, position, scene.ring.k_cache[page, row], scene.parts()[2][b])
    for name in ("k_cache", "v_cache"):
        assert_same(getattr(scene.ring, name), getattr(before, name), name)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_cache_of_many_splits(cache_dtype, kernel):
    scales = {"k_scale": torch.tensor([0.02]), "v_scale": torch.tensor([0.03])}
    scene = make_step(
        LONG, heads=Heads(2, 1, 32), dtype=torch.bfloat16, cache_dtype=cache_dtype, **scales
    )
    check(scene, scene.decode(backend="triton"), scene.ring.copy())


def test_the_last_program_reduces_whatever_its_split(kernel, monkeypatch):
    # Backwards, the oldest split is the last to count, and the newest writes its slot first.
    scene = make_step(replace_window(LONG, 60, 1), dtype=torch.float32)
    forwards = copied(scene)
    expected = forwards.decode(backend="triton")
    run_backwards(monkeypatch)
    assert_same_results(scene.decode(backend="triton"), expected, "backwards")
    assert_same(scene.ring.k_cache, forwards.ring.k_cache, "k_cache")


def replace_window(chunk: Chunk, window: int, pages_per_seq: int) -> Chunk:
    return chunk._replace(window=window, pages_per_seq=pages_per_seq)


def test_a_workspace_serves_calls_of_any_size_in_turn(kernel):
    wide = make_step(LONG, dtype=torch.float32)
    narrow = make_step(Chunk("two", (70, 30), (1, 1), None, 96, 1), heads=Heads(6, 1, 40))
    workspace = torch.full((40_000,), 255, dtype=torch.uint8)  # NaN where partials go
    counters(workspace).zero_()
    for scene in (narrow, wide, wide, narrow, wide):
        expected = copied(scene).decode(backend="triton")
        result = copied(scene).decode(workspace=workspace, backend="triton")
        assert_same_results(result, expected, f"batch {len(scene.qkv)}")
        assert not counters(workspace).any(), "the counters wrap to 0"
        assert (workspace[-40_000 * 31 // 32 :] != 255).any(), "partials went elsewhere"


def test_counters_count(kernel):
    # A counter that is one ahead lets the block before the last reduce: this must show.
    scene = make_step(Chunk("one", (70,), (1,), None, 96, 1), heads=Heads(1, 1, 16))
    expected = copied(scene).decode(backend="triton")
    workspace = torch.zeros(40_000, dtype=torch.uint8)
    counters(workspace)[0] = 1
    out, _ = copied(scene).decode(workspace=workspace, backend="triton")
    assert not torch.equal(out, expected[0])
    assert counters(workspace)[0] == 1, "the newest split counted after the reduction"


@pytest.mark.parametrize(
    ("first", "size", "why"), [(0, 100, "got 100"), (1, 40_000, "of 16 bytes")]
)
def test_a_small_or_misaligned_workspace_is_refused(first, size, why, kernel):
    workspace = torch.zeros(first + size, dtype=torch.uint8)[first:]
    with pytest.raises(ValueError, match=f"decode_attention: workspace .*{why}"):
        make_step(LONG).decode(workspace=workspace, backend="triton")


def test_idle_rows_and_a_table_of_larger_rows(kernel):
    scene = make_step(LONG, dtype=torch.bfloat16)
    expected_ring = scene.ring.copy()
    expected = copied(scene).decode(backend="triton")
    idle, live = [0, 3, 6], [1, 2, 4, 5]
    table = torch.full((7, 5), 99, dtype=torch.int32)
    table[:, 1:3] = scene.ring.block_table
    table[idle] = -1
    positions = scene.int32([-1 if b in idle else p for b, p in enumerate(CONTEXTS)])
    out, lse = scene.decode(positions=positions, block_table=table[:, 1:3], backend="triton")
    assert (out[idle] == 0).all() and (lse[idle] == -torch.inf).all()
    assert_same_results((out[live], lse[live]), [x[live] for x in expected], "live rows")
    for b in live:
        expected_ring.write(b, CONTEXTS[b], *(part[b] for part in scene.parts()[1:]))
    assert_same(scene.ring.k_cache, expected_ring.k_cache, "k_cache")


def test_bits_do_not_depend_on_capacity_or_neighbours(kernel):
    chunk = Chunk("wraps", (40, 77, 120), (1, 1, 1), 50, 32, 2)
    scene = make_step(chunk, heads=Heads(2, 1, 16))
    for batch_invariant in (False, True):
        how = {"batch_invariant": batch_invariant, "backend": "triton"}
        expected = copied(scene).decode(**how)
        other = ring.empty_ring(3, 10, 16, 1, 16)
        for b, context in enumerate(chunk.context_lens):
            other.fill(b, scene.past_k[b], scene.past_v[b], max(0, context - 49), context)
            other.place(b, context)
        assert_same_results(replace(scene, ring=other).decode(**how), expected, "other ring")
    alone = copied(scene).decode(
        **{name: x[1:2] for name, x in zip("qkv", scene.parts(), strict=True)},
        block_table=scene.ring.block_table[1:2],
        positions=scene.int32([77]),
        **how,
    )
    assert_same_results(alone, [x[1:2] for x in expected], "alone")


def test_a_slot_without_a_page_is_not_written(kernel):
    # The op refuses such a table on the CPU; on a GPU it cannot look.
    for table, position in ([0, -1], 16), ([-1], 5):
        q, k, v = (torch.ones(1, heads, 16) for heads in (2, 1, 1))
        memory = torch.zeros(2, 16, 1, 16)  # a page before the caches
        table = torch.tensor([table], dtype=torch.int32)
        out, lse = torch.empty_like(q), torch.empty(1, 2)
        kernel.decode_attention(
            q, k, v, memory[1:], memory[1:], table, torch.tensor([position], dtype=torch.int32),
            None, None, True, 1, None, None, 1.0, None, None, None, False, out, lse,
        )  # fmt: skip
        assert (out == 1).all() and (memory == 0).all()


def test_slots_2_gb_apart(kernel):
    apart = 2**30  # elements: the third slot begins at 2^31
    memory = torch.empty(2 * apart + 32, dtype=torch.float16)
    scene = make_step(
        Chunk("apart", (2,), (1,), None, 3, 1), heads=Heads(2, 1, 16), dtype=torch.float16
    )
    shape, steps = (1, 3, 1, 16), (4 * apart, apart, 16, 1)
    caches = [memory[first:].as_strided(shape, steps) for first in (0, 16)]
    for cache, own in zip(caches, (scene.ring.k_cache, scene.ring.v_cache), strict=True):
        cache.copy_(own[scene.ring.block_table[0]])
    before = scene.ring.copy()
    wide = replace(before, k_cache=caches[0], v_cache=caches[1], block_table=scene.int32([[0]]))
    assert_same_results(
        replace(scene, ring=wide).decode(backend="triton"), scene.decode(backend="triton"), "apart"
    )
    assert_same(caches[0][0, 2], scene.ring.k_cache[scene.ring.block_table[0, 0], 2], "k_cache")
