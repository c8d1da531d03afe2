"""The shipped csrc/cuda/decode_attention.cu on the host emulator.

Scenes are those of the Triton kernel's tests, and some around the edges of this kernel's tiles.
"""

from dataclasses import replace

import emulated_decode
import peer
import pytest
import ring
import scene as scenes
import torch
from emulated_decode import CELL, decode
from emulator.guard_bands import GuardBands
from emulator.host_build import missing
from scene import make_step, rope_tables
from shapes import Chunk, Heads
from test_decode_attention import check, check_outputs, check_ring, exact_rope, rotated
from test_decode_attention_interpreted import CONTEXTS, EDGES, LONG, assert_same_results, copied
from tolerance import assert_same

from mistral_kernels import ops
from mistral_kernels.ops import dispatch

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
emulated, many_splits = emulated_decode.emulated, emulated_decode.many_splits  # fixtures
DTYPES = (torch.bfloat16, torch.float16)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
# Around tiles of 64 keys, rings wrapped never, once, twice and more; EDGES are of 16, a slice.
TILES = (0, 62, 63, 64, 65, 127, 128, 191, 320)
TILE_EDGES = (
    Chunk("window just below a tile", TILES, (1,) * 9, 63, 64, 1),
    Chunk("window of a tile, the ring", TILES, (1,) * 9, 64, 32, 2),
    Chunk("window just above a tile", TILES, (1,) * 9, 65, 16, 5),
    Chunk("window of tiles, odd pages", TILES, (1,) * 9, 128, 48, 3),
    Chunk("starts at edges", TILES, (1,) * 9, None, 112, 3, (0, 63, 62, 64, 1, 64, 127, 0, 257)),
)
HEADS = (
    [Heads(2, 2, 16), Heads(4, 2, 32), Heads(5, 1, 80), Heads(6, 1, 128), Heads(7, 1, 200)]
    + [Heads(8, 1, 256), Heads(9, 1, 64), Heads(12, 1, 128), Heads(16, 1, 64), Heads(34, 2, 8)]
)  # fmt: skip


@pytest.mark.parametrize(
    ("chunk", "dtype"),
    [(chunk, DTYPES[i % 2]) for i, chunk in enumerate((*EDGES, *TILE_EDGES))],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_edges_of_tiles_windows_and_rings(chunk, dtype, many_splits):
    scene = make_step(chunk, heads=Heads(3, 1, 24), dtype=dtype)
    check(scene, decode(scene), scene.ring.copy())


@pytest.mark.parametrize(
    ("heads", "dtype"), [(heads, DTYPES[i % 2]) for i, heads in enumerate(HEADS)], ids=str
)
def test_heads(heads, dtype, many_splits):
    scene = make_step(Chunk("two", (140, 17), (1, 1), None, 160, 1), heads=heads, dtype=dtype)
    check(scene, decode(scene), scene.ring.copy())


@pytest.mark.parametrize("has_new", [True, False])
@pytest.mark.parametrize("hidden", [20, 150])
def test_what_starts_hides_may_hold_nan(hidden, has_new, many_splits):
    # The newest token is hidden, by a start far behind it or by the next position; it is written.
    chunk = Chunk("hidden", (hidden, 150, 40), (1, 1, 1), None, 160, 1, (hidden + 9, 0, 41))
    scene = make_step(chunk, heads=Heads(4, 2, 64), dtype=torch.float16)
    before = scene.ring.copy()
    _, k, v = scene.parts()
    k[[0, 2]], v[[0, 2]] = torch.nan, torch.nan
    if not has_new:
        for b, position in enumerate(chunk.context_lens):
            scene.ring.write(b, position, k[b], v[b])
    out, lse = decode(scene, **({} if has_new else {"k": None, "v": None}))
    assert (out[[0, 2]] == 0).all() and (lse[[0, 2]] == -torch.inf).all()
    assert out[1].isfinite().all()
    for b, position in enumerate(chunk.context_lens):
        before.write(b, position, k[b], v[b])
    check_ring(scene.ring, before)


@pytest.mark.parametrize(("scaled", "dtype"), [(False, DTYPES[0]), (True, DTYPES[1])], ids=str)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
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


@pytest.mark.parametrize(("dtype", "scales"), [*zip(DTYPES, (1, 2), strict=True)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 128, 256])
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_quantised_cache_attends_what_it_stored(dtype, cache_dtype, head_dim, scales, many_splits):
    kind = {"k_scale": torch.tensor([0.02, 0.031][:scales])}
    kind |= {"v_scale": torch.tensor([0.03, 0.011][:scales])}
    chunk = Chunk("two", (97, 3), (1, 1), 90, 96, 1)
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


def test_a_slot_without_a_page_is_not_written():
    # The op refuses such a table on the CPU; on a GPU it cannot look.
    scene = make_step(Chunk("one", (16,), (1,), 1, 16, 2), heads=Heads(2, 1, 8), dtype=DTYPES[0])
    table = torch.tensor([[0, -1]], dtype=torch.int32)
    with GuardBands() as guard:
        inputs = map(guard, (*scene.parts(), scene.ring.k_cache, scene.ring.v_cache, table))
        how = (None, None, True, 1, None, None, 1.0, None, None, None, False)  # from cos on
        out, _ = CELL._decode_attention_cuda(*inputs, scene.int32([16]), *how)
    assert_same(out, scene.parts()[2].expand(1, 2, 8), "out")


def test_no_sequences():
    scene = scenes.make_scene(Chunk("nobody", (), (), 8, 16, 2), dtype=torch.bfloat16)
    out, lse = decode(scene)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


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
