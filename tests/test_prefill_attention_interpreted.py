"""prefill_attention's Triton kernels in the interpreter, on small tiles that few keys cross.

`test_prefill_attention.py` runs the same backend there with the tiles that are shipped.
"""

from dataclasses import replace

import pytest
import ring
import torch
from scene import SMALL, Scene, make_scene
from shapes import LAYOUTS, Chunk, Heads, laid_out
from test_prefill_attention import alone, check, make_changed
from tolerance import assert_same

from mistral_kernels.kernels import attention_combine

pytestmark = pytest.mark.interpreter
TILE, SPLIT = 16, 32
FULL = Chunk("nothing wraps", (45, 3), (5, 20), None, 16, 5)


@pytest.fixture(params=(torch.float32, torch.bfloat16, torch.float16), ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def kernel():
    from mistral_kernels.kernels import prefill_attention

    return prefill_attention


@pytest.fixture
def small_tiles(kernel, monkeypatch):
    """Tiles of 16 rows and 16 keys."""
    shipped = kernel.tile_config

    def tile_config(head_dim, group, *shape, **cache):
        config = shipped(head_dim, group, *shape, **cache)
        return config | {"BLOCK_M": max(TILE, config["BLOCK_M"] * (group > TILE)), "BLOCK_N": TILE}

    monkeypatch.setattr(kernel, "tile_config", tile_config)


@pytest.fixture
def small_splits(kernel, small_tiles, monkeypatch):
    """Splits of two tiles, on a device with so many multiprocessors that all queries are few."""
    monkeypatch.setattr(attention_combine, "SPLIT_KEYS", SPLIT)
    monkeypatch.setattr(kernel, "processor", lambda device: ((8, 0), 10**6))


def run(scene: Scene, **changes):
    return scene.prefill(backend="triton", **changes)


def assert_same_pair(results, expected, what: str) -> None:
    for name, got, want in zip(("out", "lse"), results, expected, strict=True):
        assert_same(got, want, f"{name}, {what}")


# Tiles of 8 tokens: sequences end inside, at and after one; keys cross two and three tiles.
@pytest.mark.parametrize("window", [1, 3, 15, 16, 17, 31, 32, 33, None])
def test_windows_around_tiles(window, dtype, small_tiles):
    scene = make_scene(alone(window, (41, 0, 1, 16)), heads=Heads(2, 1, 16), dtype=dtype)
    check(scene, scene.prefill_alone(backend="triton"))


@pytest.mark.parametrize("tokens", [15, 16, 17, 33])
def test_without_a_mask(tokens, dtype, small_tiles):
    scene = make_scene(alone(None, (tokens, 3)), heads=Heads(2, 1, 16), dtype=dtype)
    check(scene, scene.prefill_alone(causal=False, backend="triton"), causal=False)


WRAPS = [
    # The ring ends inside a tile, on its edge; pages smaller, as large as, larger than a tile.
    Chunk("pages of 4", (37, 75), (6, 9), 20, 4, 6),
    Chunk("pages of 16", (47, 48), (5, 18), 32, 16, 2),
    Chunk("pages of 24", (60, 130), (3, 17), 40, 24, 2),
    Chunk("one page", (39, 79), (9, 4), 40, 40, 1),
    Chunk("one page, below a tile", (21, 9), (5, 2), 7, 8, 1),
    Chunk("window ends in the new keys", (20, 3), (30, 19), 5, 4, 2),
    Chunk("left padding", (37, 20), (6, 9), 20, 4, 6, (30, 22)),
    Chunk("no window", (33, 16), (3, 17), None, 8, 6),
]


@pytest.mark.parametrize("chunk", WRAPS, ids=lambda chunk: chunk.name)
def test_ring_and_new_keys(chunk, dtype, small_tiles):
    scene = make_scene(chunk, heads=Heads(3, 1, 16), dtype=dtype)
    check(scene, run(scene))


@pytest.mark.parametrize("chunk", WRAPS, ids=lambda chunk: chunk.name)
def test_splits(chunk, small_splits):
    scene = make_scene(chunk, heads=Heads(3, 1, 16), dtype=torch.bfloat16)
    check(scene, run(scene))


def test_one_split_alone_has_the_bits_of_none(small_splits):
    scene = make_scene(Chunk("short", (9, 0), (4, 20), None, 8, 12))
    assert_same_pair(run(scene), run(scene, batch_invariant=True), "batch_invariant")


def test_splits_of_several_tiles(small_splits, monkeypatch):
    # Three splits of 96 and 112 positions: of 48 keys, the last shorter.
    monkeypatch.setattr(attention_combine, "MAX_SPLITS", 3)
    scene = make_scene(Chunk("long", (96, 112), (3, 5), None, 16, 8), heads=Heads(3, 1, 16))
    check(scene, run(scene))


def test_splits_do_not_depend_on_the_capacity(small_splits):
    scene = make_scene(FULL)
    expected = run(scene)
    for pages in (7, 20):
        other = ring.empty_ring(2, pages, 16, SMALL.kv_heads, SMALL.head_dim)
        for b, context in enumerate(FULL.context_lens):
            other.fill(b, scene.past_k[b], scene.past_v[b], 0, context)
        assert_same_pair(run(replace(scene, ring=other)), expected, f"{pages} pages")


@pytest.mark.parametrize("window", [None, 21])
def test_chunks_that_end_on_a_tile_keep_the_bits(window, small_tiles):
    scene = make_scene(alone(window, (50,)), heads=Heads(2, 1, 16))
    q, k, v = scene.parts()
    whole = scene.prefill_alone(backend="triton")
    filled = ring.empty_ring(1, 4, 16, 1, 16)
    for begin, end in ((0, 16), (16, 48), (48, 50)):
        part = scene.prefill(
            q=q[begin:end], k=k[begin:end], v=v[begin:end],
            cu_seqlens=scene.int32([0, end - begin]), context_lens=scene.int32([begin]),
            **filled.arguments(), backend="triton",
        )  # fmt: skip
        assert_same_pair(part, [x[begin:end] for x in whole], f"from {begin}")
        filled.fill(0, k, v, begin, end)


@pytest.mark.parametrize("chunk", WRAPS[:5], ids=lambda chunk: chunk.name)
def test_keys_stored_first(chunk, small_splits):
    lookahead = -(-max(chunk.seqlens) // chunk.page_size)
    chunk = chunk._replace(pages_per_seq=chunk.pages_per_seq + lookahead)
    scene = make_scene(chunk, heads=Heads(3, 1, 16), dtype=torch.bfloat16)
    _, k, v = scene.parts()
    for b, (begin, end) in enumerate(zip(scene.offsets, scene.offsets[1:], strict=False)):
        history = (
            torch.cat((scene.past_k[b], k[begin:end])),
            torch.cat((scene.past_v[b], v[begin:end])),
        )
        scene.ring.fill(b, *history, chunk.context_lens[b], chunk.context_lens[b] + end - begin)
    check(scene, run(scene, k=None, v=None), stored_first=True)
    check(scene, run(scene, k=None, v=None, batch_invariant=True), stored_first=True)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_cache(cache_dtype, dtype, small_splits):
    scales = {"k_scale": torch.tensor([0.02, 0.03]), "v_scale": torch.tensor([0.03, 0.01])}
    scene = make_scene(WRAPS[0], dtype=dtype, cache_dtype=cache_dtype, **scales)
    check(scene, run(scene))


HEADS = [Heads(2, 1, head_dim) for head_dim in (1, 17, 32, 64, 80, 96, 128, 256)]
HEADS += [Heads(group, 1, 16) for group in (5, 16, 17, 33)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads(heads, dtype, small_tiles):
    scene = make_scene(Chunk("few", (20,), (3,), 18, 4, 5), heads=heads, dtype=dtype)
    check(scene, run(scene))


@pytest.mark.parametrize("seqlens", [(1,) * 9, (0, 0, 3, 0, 17, 8, 0, 1, 9, 0), (7, 8, 9)], ids=str)
def test_each_tile_finds_its_sequence(seqlens, small_tiles):
    scene = make_scene(alone(None, seqlens), heads=Heads(2, 1, 16))
    check(scene, scene.prefill_alone(backend="triton"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, small_tiles):
    scene = make_scene(WRAPS[0])
    q, k, v = (laid_out(part, layout) for part in scene.parts())
    check(scene, run(scene, q=q, k=k, v=v))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_poison_outside_of_every_window(value, dtype, small_tiles):
    # The tile of queries 70 to 73 sees from 50 on: its first key tile holds 48 and 49 too.
    scene = make_scene(Chunk("poison", (70,), (4,), 21, 16, 5), dtype=dtype)
    expected = run(scene)
    for position in (40, 48, 49):
        scene = make_changed(scene, position, value)
    assert_same_pair(run(scene), expected, "poisoned")


def test_a_live_value_of_nan_stays_within_query_tiles(small_tiles):
    # Tiles of 8 tokens: rows 16 to 18 share that of 19, row 39 sees it last, 40 begins a tile.
    scene = make_scene(alone(21, (48,)), heads=Heads(2, 1, 16))
    expected = scene.prefill_alone(backend="triton")
    scene.parts()[2][19] = torch.nan
    out, lse = scene.prefill_alone(backend="triton")
    assert out[19:40].isnan().all()
    for rows in (slice(16), slice(40, None)):
        assert_same(out[rows], expected[0][rows], "out")
    assert_same(lse, expected[1], "lse")


def test_rows_2_gb_apart(small_tiles):
    apart = 2**30  # elements: the third row begins at 2^31
    memory = torch.empty(2 * apart + 64, dtype=torch.float16)
    scene = make_scene(alone(2, (3,)), heads=Heads(1, 1, 16), dtype=torch.float16)
    wide = [memory[first:].as_strided((3, 1, 16), (apart, 16, 1)) for first in (0, 16, 32)]
    for part, own in zip(wide, scene.parts(), strict=True):
        part.copy_(own)
    q, k, v = wide
    check(scene, scene.prefill_alone(q=q, k=k, v=v, backend="triton"))


def test_a_nan_query_spoils_its_own_row_only(small_splits):
    scene = make_scene(FULL)
    expected = run(scene)
    scene.parts()[0][2, 1] = torch.nan
    out, lse = run(scene)
    assert out[2, 1].isnan().all() and lse[2, 1].isnan()
    others = ~lse.isnan()
    assert others.sum() == others.numel() - 1
    assert_same_pair((out[others], lse[others]), [x[others] for x in expected], "others")
