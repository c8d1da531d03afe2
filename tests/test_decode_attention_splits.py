"""decode_attention over contexts of many splits: right, and the same bits however it is worked."""

from dataclasses import replace

import pytest
import ring
import torch
from native_only import torch_ops_of
from scene import Scene, make_step, rope_tables
from shapes import Chunk, Heads
from test_decode_attention import check
from tolerance import assert_same

from mistral_kernels import ops
from mistral_kernels.ops import dispatch

OP = "decode_attention"
# Around the edges of splits of 256 keys; the last two have keys in up to four of them.
CONTEXTS = (254, 255, 256, 511, 700, 900)
ONES = (1,) * len(CONTEXTS)
LONG = (
    Chunk("no window", CONTEXTS, ONES, None, 128, 8),
    Chunk("window ends inside a split", CONTEXTS, ONES, 300, 32, 10),
    Chunk("starts inside a split", CONTEXTS, ONES, 600, 16, 38, (3, 255, 256, 300, 520, 400)),
)
needs_core = pytest.mark.skipif(
    dispatch.unavailable("cpu") is not None, reason="installed without a C++ compiler"
)


def assert_same_results(got, expected, what: str) -> None:
    for name, one, other in zip(("out", "lse"), got, expected, strict=True):
        assert_same(one, other, f"{name}, {what}")


def copied(scene: Scene) -> Scene:
    return replace(scene, ring=scene.ring.copy())


@pytest.mark.parametrize("chunk", LONG, ids=lambda chunk: chunk.name)
def test_many_splits(chunk, dtype, backend, device):
    scene = make_step(chunk, heads=Heads(3, 1, 24), dtype=dtype, device=device)
    check(scene, scene.decode(backend=backend), scene.ring.copy())


@pytest.mark.parametrize("chunk", LONG, ids=lambda chunk: chunk.name)
def test_bits_do_not_depend_on_threads_or_neighbours(chunk, dtype, backend, device, threads):
    # Every second sequence: of one split, of two or three, of four.
    starts = chunk.starts and chunk.starts[1::2]
    chunk = chunk._replace(context_lens=CONTEXTS[1::2], seqlens=ONES[1::2], starts=starts)
    scene = make_step(chunk, heads=Heads(10, 2, 40), dtype=dtype, device=device)
    threads(1)
    expected = copied(scene).decode(backend=backend, batch_invariant=True)
    for count in (2, 3) if backend == "cpu" else ():
        threads(count)
        result = copied(scene).decode(backend=backend, batch_invariant=True)
        assert_same_results(result, expected, f"{count} threads")
    starts = scene.visibility()["starts"]
    for b, context in enumerate(chunk.context_lens):
        alone = scene.decode(
            **{name: x[b : b + 1] for name, x in zip("qkv", scene.parts(), strict=True)},
            block_table=scene.ring.block_table[b : b + 1],
            positions=scene.int32([context]),
            starts=None if starts is None else starts[b : b + 1],
            batch_invariant=True,
            backend=backend,
        )
        assert_same_results(alone, [x[b : b + 1] for x in expected], f"sequence {b} alone")


def test_bits_do_not_depend_on_where_the_ring_wraps(backend, device):
    window = 500
    chunk = Chunk("wraps", (300, 777, 1200), (1, 1, 1), window, 250, 2)
    scene = make_step(chunk, heads=Heads(2, 1, 16), device=device)
    expected = copied(scene).decode(backend=backend)
    for page_size, pages_per_seq in ((16, 32), (13, 40), (512, 1), (1000, 1)):
        other = ring.empty_ring(3, pages_per_seq, page_size, 1, 16, device=device)
        for b, context in enumerate(chunk.context_lens):
            first = max(0, context + 1 - window)
            other.fill(b, scene.past_k[b], scene.past_v[b], first, context)
            other.place(b, context)
        result = replace(scene, ring=other).decode(backend=backend)
        assert_same_results(result, expected, f"{pages_per_seq} pages of {page_size}")


@pytest.mark.parametrize("position", [10, 255, 256, 699])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_nan_of_any_split_shows(cache, position, backend, device):
    scene = make_step(Chunk("nan", (700,), (1,), None, 1024, 1), device=device)
    page, row = scene.ring.place(0, position)
    getattr(scene.ring, cache)[page, row, 0, 3] = torch.nan
    out, _ = scene.decode(backend=backend)
    assert out[0, :2].isnan().any(1).all(), "the heads of kv head 0"
    assert not out[0, 2:].isnan().any(), "the others"


@pytest.mark.parametrize("context", [3, 600])
def test_keys_of_weight_0_only(context, backend, device):
    # Each score is -inf: no key counts, and no NaN comes of -inf - -inf.
    scene = make_step(Chunk("far away", (context,), (1,), None, 1024, 1), device=device)
    scene.ring.k_cache.fill_(-torch.inf)
    q = torch.ones_like(scene.parts()[0])
    out, lse = scene.decode(q=q, k=torch.full_like(scene.parts()[1], -torch.inf), backend=backend)
    assert (out == 0).all() and (lse == -torch.inf).all()


@needs_core
@pytest.mark.parametrize("rotated", [False, True], ids=["rotates", "already rotated"])
def test_no_torch_op_computes(rotated):
    scene = make_step(Chunk("pair", (14, 3), (1, 1), 8, 4, 2))
    tables = {"cos": None, "sin": None} if rotated else rope_tables(16, torch.float32, "cpu")
    call = {**scene.ring.arguments(), **tables, "positions": scene.int32((14, 3))}
    run = dispatch.OPS[OP]["cpu"].run
    schema = torch.ops.mistral_kernels.decode_attention.default._schema
    names = [argument.name for argument in schema.arguments][:-1]  # without backend
    call |= dict(zip("qkv", scene.parts(), strict=True)) | {"interleaved": True, "scale": 0.25}
    call |= {"window": 8, "starts": scene.int32((0, 1)), "batch_invariant": False}
    assert torch_ops_of(run, *(call.get(name) for name in names)) == []
    reference = dispatch.OPS[OP]["reference"].run
    assert torch_ops_of(reference, *(call.get(name) for name in names)), "the recorder is blind"


def test_idle_entries_of_a_table_may_be_anything_unused():
    # Entries that are no pages are refused only where the call would follow them.
    scene = make_step(Chunk("pair", (14, 3), (1, 1), 3, 4, 2))
    expected = copied(scene).decode()
    unused = scene.ring.copy()
    unused.block_table[1, 1] = 99  # slots 4-7, while sequence 1 lives in 1-3
    assert_same_results(replace(scene, ring=unused).decode(), expected, "an unused entry")
    used = scene.ring.copy()
    used.block_table[1, 0] = 99
    with pytest.raises(ValueError, match=r"decode_attention: block_table .* got 99 for sequence 1"):
        ops.decode_attention(*scene.parts(), **used.arguments(), positions=scene.int32((14, 3)))
