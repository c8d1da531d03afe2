"""The CPU cell of prefill_attention where its tiles, vectors, splits and threads meet."""

from dataclasses import replace

import pytest
import ring
import torch
from native_only import torch_ops_of
from scene import SMALL, Scene, make_scene
from shapes import Chunk, Heads
from test_prefill_attention import alone, check, make_changed
from tolerance import assert_same

from mistral_kernels.ops import dispatch

OP = "prefill_attention"
pytest.importorskip("mistral_kernels._C", reason="installed without a C++ compiler")
pytestmark = pytest.mark.usefixtures("each_instruction_set")
TILE_ROWS, SPLIT = 192, 1024  # csrc/cpu/prefill_tile.h; blocks have 64 keys


def assert_same_pair(results, expected, what: str) -> None:
    for name, got, want in zip(("out", "lse"), results, expected, strict=True):
        assert_same(got, want, f"{name}, {what}")


def long_scene(context: int, tokens: int, window: int | None = None, **kind) -> Scene:
    """One sequence on a ring without a wrap, drawn at once: `make_scene` writes row by row."""
    scene = make_scene(Chunk("long", (0,), (tokens,), window, 16, 1), **kind)
    pages = -(-context // 16)
    filled = ring.empty_ring(1, pages, 16, SMALL.kv_heads, SMALL.head_dim, **kind)
    filled.block_table[0] = torch.randperm(pages, dtype=torch.int32)
    for cache, past in ((filled.k_cache, scene.past_k), (filled.v_cache, scene.past_v)):
        past[0] = torch.randn(context, SMALL.kv_heads, SMALL.head_dim).to(cache.dtype)
        rows = torch.arange(context)
        cache[filled.block_table[0][rows // 16].long(), rows % 16] = past[0]
    return replace(scene, chunk=scene.chunk._replace(context_lens=(context,)), ring=filled)


# One row, a row short of a vector of 16 and beyond it, then around one and two tiles.
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
def test_tile_edges(group):
    around = [TILE_ROWS // group + step for step in (-1, 0, 1)]
    seqlens = (1, 15 // group + 1, 17, *around)
    scene = make_scene(alone(70, seqlens), heads=Heads(group, 1, 8))
    check(scene, scene.prefill_alone(backend="cpu"))


def test_a_group_larger_than_a_tile():
    scene = make_scene(alone(2, (3, 1)), heads=Heads(TILE_ROWS + 5, 1, 4))
    check(scene, scene.prefill_alone(backend="cpu"))


@pytest.mark.parametrize("head_dim", [2, 3, 8, 17, 48, 80, 96, 120, 128, 160, 256])
def test_head_dims(head_dim, dtype_of_kernel):
    chunk = Chunk("blocks", (70,), (9,), 66, 16, 5)
    scene = make_scene(chunk, heads=Heads(2, 1, head_dim), dtype=dtype_of_kernel)
    check(scene, scene.prefill(backend="cpu"))


@pytest.fixture(params=dispatch.KERNEL_DTYPES, ids=str)
def dtype_of_kernel(request):
    return request.param


@pytest.mark.parametrize("context", [SPLIT - 1, SPLIT, 3 * SPLIT + 70])
@pytest.mark.parametrize("tokens", [1, 4])
def test_bits_do_not_depend_on_the_number_of_threads(context, tokens, threads):
    scene = long_scene(context, tokens)
    threads(1)
    expected = scene.prefill(backend="cpu")
    check(scene, expected)
    for count in (2, 3, 7):
        threads(count)
        assert_same_pair(scene.prefill(backend="cpu"), expected, f"{count} threads")


def test_bits_of_many_tiles_do_not_depend_on_the_number_of_threads(threads):
    scene = make_scene(alone(200, (700, 3, 0, 301)))
    threads(1)
    expected = scene.prefill_alone(backend="cpu")
    for count in (2, 3):
        threads(count)
        assert_same_pair(scene.prefill_alone(backend="cpu"), expected, f"{count} threads")


def test_bits_of_a_row_do_not_depend_on_the_rows_of_its_tile():
    # Rows of a tile share panels of 3, 2 or 1 vectors and blocks; alone, a row has all for itself.
    scene = make_scene(alone(None, (100,)), heads=Heads(3, 1, 16))
    q, k, v = scene.parts()
    whole = scene.prefill_alone(backend="cpu")
    filled = ring.empty_ring(1, 100, 1, 1, 16)
    filled.fill(0, k, v, 0, 100)
    for row in (0, 1, 20, 63, 64, 65, 98, 99):
        single = scene.prefill(
            q=q[row : row + 1], k=k[row : row + 1], v=v[row : row + 1],
            cu_seqlens=scene.int32([0, 1]), context_lens=scene.int32([row]),
            **filled.arguments(), backend="cpu",
        )  # fmt: skip
        assert_same_pair(single, [part[row : row + 1] for part in whole], f"row {row} alone")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [20, 69, 70, 75])
def test_a_masked_key_leaves_a_row_alone_whatever_it_holds(position, value):
    # Positions 0-69 are cached and 70-77 new; the window makes some rows of the tile miss each.
    scene = make_scene(Chunk("poison", (70,), (8,), 53, 16, 5))
    out, lse = scene.prefill(backend="cpu")
    changed_out, changed_lse = make_changed(scene, position, value).prefill(backend="cpu")
    for row, query in enumerate(range(70, 78)):
        if query - 53 < position <= query:
            assert not changed_out[row].isfinite().all(), f"query {query} sees the key"
        else:
            assert_same(changed_out[row], out[row], f"out of query {query}")
            assert_same(changed_lse[row], lse[row], f"lse of query {query}")


@pytest.mark.parametrize("context", [0, 1100])
def test_a_nan_query_spoils_its_own_row_only(context):
    scene = long_scene(context, 5) if context else make_scene(alone(None, (5,)))
    expected = scene.prefill(backend="cpu")
    scene.parts()[0][2, 1] = torch.nan
    out, lse = scene.prefill(backend="cpu")
    assert out[2, 1].isnan().all() and lse[2, 1].isnan()
    others = torch.ones_like(lse, dtype=torch.bool)
    others[2, 1] = False
    assert_same_pair((out[others], lse[others]), [part[others] for part in expected], "others")


def test_it_computes_nothing_in_torch():
    scene = make_scene(Chunk("wraps", (6, 14), (3, 4), 8, 4, 2))
    cu_seqlens, context_lens = scene.packing().values()
    cache = scene.ring.k_cache, scene.ring.v_cache, scene.ring.block_table
    rest = context_lens, None, 8, True, 0.25, None, None, True
    run = dispatch.OPS[OP]["cpu"].run
    assert torch_ops_of(run, *scene.parts(), cu_seqlens, *cache, *rest) == []
