"""store_kv_ against writing one token after the other into a ring, on every backend."""

import pytest
import refusal
import registration
import ring
import shapes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_only import torch_ops_of
from tolerance import assert_same
from whole_graph import whole_graph

from mistral_kernels import ops
from mistral_kernels.ops import dispatch

OP = "store_kv_"
QUANTISED = (torch.int8, torch.float8_e4m3fn)
CHUNKS = [chunk for chunk in shapes.CHUNKS if chunk.starts is None]


def packed(chunk: shapes.Chunk, *, dtype=torch.float32, device="cpu", kv_heads=2, head_dim=16):
    """Return k, v of the new tokens as views of one tensor, and the packing arguments."""
    kv = torch.randn(sum(chunk.seqlens), 2, kv_heads, head_dim, device=device).to(dtype)
    offsets = torch.tensor([0, *chunk.seqlens], device=device).cumsum(0, dtype=torch.int32)
    context_lens = torch.tensor(chunk.context_lens, dtype=torch.int32, device=device)
    return kv[:, 0], kv[:, 1], offsets, context_lens


def prepared(chunk: shapes.Chunk, **kind) -> tuple[ring.Ring, ring.Ring]:
    """Return a ring with pages for the new tokens, and a copy to write what it should hold."""
    shape = {"kv_heads": 2, "head_dim": 16, **kind}
    empty = ring.empty_ring(len(chunk.seqlens), chunk.pages_per_seq, chunk.page_size, **shape)
    for sequence, (context, tokens) in enumerate(
        zip(chunk.context_lens, chunk.seqlens, strict=True)
    ):
        for position in range(context, context + tokens):
            empty.place(sequence, position)
    return empty, empty.copy()


def write_in_order(expected: ring.Ring, k, v, cu_seqlens, context_lens) -> None:
    """Write every token at its position, oldest first, as a loop of one-token steps would."""
    for sequence, context in enumerate(context_lens.tolist()):
        begin, end = cu_seqlens[sequence : sequence + 2].tolist()
        for row in range(begin, end):
            if context + row - begin >= 0:
                expected.write(sequence, context + row - begin, k[row], v[row])


def check(got: ring.Ring, expected: ring.Ring) -> None:
    """Compare whole caches, poison and spare pages included."""
    assert_same(got.k_cache, expected.k_cache, "k_cache")
    assert_same(got.v_cache, expected.v_cache, "v_cache")
    assert_same(got.block_table, expected.block_table, "block_table")


@pytest.mark.parametrize("layout", ring.PAGE_LAYOUTS)
@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: chunk.name)
def test_store_kv(chunk, layout, dtype, backend, device):
    k, v, *packing = packed(chunk, dtype=dtype, device=device)
    got, expected = prepared(chunk, dtype=dtype, device=device, layout=layout)
    given = k.clone(), v.clone()
    k_cache, v_cache = ops.store_kv_(k, v, **got.arguments(), **named(packing), backend=backend)
    assert k_cache is got.k_cache and v_cache is got.v_cache
    assert_same(torch.stack((k, v)), torch.stack(given), "inputs")
    write_in_order(expected, k, v, *packing)
    check(got, expected)


def named(packing: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("cu_seqlens", "context_lens"), packing, strict=True))


@pytest.mark.parametrize("scales", [1, 2], ids=["one scale", "scale a head"])
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_quantised_cache(cache_dtype, scales, dtype, backend, device):
    chunk = shapes.Chunk("wraps", (6, 3), (5, 9), 8, 4, 2)
    k, v, *packing = packed(chunk, dtype=dtype, device=device)
    k[0, 0, :4] = torch.tensor([1e4, -1e4, 0.0, 1e-8])  # saturates, and rounds to nothing
    k_scale = torch.tensor([0.0375, 0.011][:scales], device=device)
    v_scale = torch.tensor([0.02, 0.5][:scales], device=device)
    kind = {"dtype": cache_dtype, "device": device, "k_scale": k_scale, "v_scale": v_scale}
    got, expected = prepared(chunk, **kind)
    ops.store_kv_(k, v, **got.arguments(), **named(packing), backend=backend)
    write_in_order(expected, k, v, *packing)
    check(got, expected)


@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_ties_round_to_even(cache_dtype, backend, device):
    # 16 values half way between two steps of 1 (int8) or 2 (fp8, from 16 on).
    step = 1 if cache_dtype == torch.int8 else 2
    k = (torch.arange(16, device=device) + 0.5).mul(step).add(16).view(1, 1, 16)
    one = torch.ones(1, device=device)
    kind = {"dtype": cache_dtype, "device": device, "k_scale": one, "v_scale": one}
    got = ring.empty_ring(1, 1, 4, 1, 16, **kind)
    page, row = got.place(0, 0)
    lens = torch.tensor([0, 1], dtype=torch.int32, device=device)
    ops.store_kv_(k, -k, **got.arguments(), **named([lens, lens[:1]]), backend=backend)
    even = [16 + step * (n + n % 2) for n in range(16)]
    if step == 2:  # above 32 an fp8 step is 4
        even = [value if value <= 32 else None for value in even]
    for stored, sign in ((got.k_cache, 1), (got.v_cache, -1)):
        for value, want in zip(stored[page, row, 0].float().tolist(), even, strict=True):
            assert want is None or value == sign * want


def test_rows_before_the_start_are_not_stored(backend, device):
    chunk = shapes.Chunk("left padding", (-3, -9, -1), (5, 4, 1), None, 4, 1)
    k, v, *packing = packed(chunk, device=device)
    got, expected = prepared(shapes.Chunk("", (0, 0, 0), (2, 0, 0), None, 4, 1), device=device)
    ops.store_kv_(k, v, **got.arguments(), **named(packing), backend=backend)
    write_in_order(expected, k, v, *packing)
    check(got, expected)
    assert not got.k_cache.isnan().all(), "the two rows at positions 0 and 1 are stored"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 25)), min_size=1, max_size=4),
    page_size=st.sampled_from([1, 3, 4, 16]),
    pages_per_seq=st.integers(1, 4),
    head_dim=st.sampled_from([16, 80]),
)
def test_drawn_shapes(sequences, page_size, pages_per_seq, head_dim):
    context_lens, seqlens = zip(*sequences, strict=True)
    chunk = shapes.Chunk("drawn", context_lens, seqlens, None, page_size, pages_per_seq)
    k, v, *packing = packed(chunk, kv_heads=1, head_dim=head_dim)
    got, expected = prepared(chunk, kv_heads=1, head_dim=head_dim)
    ops.store_kv_(k, v, **got.arguments(), **named(packing))
    write_in_order(expected, k, v, *packing)
    check(got, expected)


WRAPS = shapes.Chunk("wraps", (6, 3), (3, 5), 8, 4, 2)


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("layout", ring.PAGE_LAYOUTS)
def test_registration(layout, quantised, backend, device):
    k, v, *packing = packed(WRAPS, device=device)
    scale = torch.ones(1, device=device) if quantised else None
    kind = {"dtype": torch.int8, "k_scale": scale, "v_scale": scale} if quantised else {}
    cache, _ = prepared(WRAPS, device=device, layout=layout, **kind)
    where = (cache.k_cache, cache.v_cache, cache.block_table, *packing, scale, scale, backend)
    registration.check("store_kv_", k, v, *where)
    k, v = shapes.laid_out(k, "permuted"), shapes.laid_out(v, "padded")
    registration.check("store_kv_", k, v, *where)


def test_compiled(backend, device):
    k, v, *packing = packed(WRAPS, device=device)
    got, expected = prepared(WRAPS, device=device)

    def store(k, v, cache_arguments):
        return ops.store_kv_(k, v, **cache_arguments, **named(packing), backend=backend)

    whole_graph(store)(k, v, got.arguments())
    store(k, v, expected.arguments())
    check(got, expected)


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
def test_no_torch_op_computes(quantised):
    if reason := dispatch.unavailable("cpu"):
        pytest.skip(reason)
    k, v, *packing = packed(WRAPS)
    scale = torch.ones(1) if quantised else None
    kind = {"dtype": torch.int8, "k_scale": scale, "v_scale": scale} if quantised else {}
    cache, _ = prepared(WRAPS, **kind)
    inputs = (k, v, cache.k_cache, cache.v_cache, cache.block_table, *packing, scale, scale)
    assert torch_ops_of(dispatch.OPS[OP]["cpu"].run, *inputs) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    chunk = shapes.Chunk("long", (6, 0, 90), (400, 3, 700), None, 64, 8)
    k, v, *packing = packed(chunk, dtype=dtype, head_dim=40)
    empty, expected = prepared(chunk, dtype=dtype, head_dim=40)
    write_in_order(expected, k, v, *packing)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = empty.copy()
            ops.store_kv_(k, v, **got.arguments(), **named(packing))
            check(got, expected)
    finally:
        torch.set_num_threads(before)


K, V, *PACKING = packed(WRAPS)
RING = prepared(WRAPS)[0]
VALID = {"k": K, "v": V, **RING.arguments(), **named(PACKING)}
SCALE = torch.ones(1)
INT8 = ring.empty_ring(2, 2, 4, 2, 16, dtype=torch.int8, k_scale=SCALE, v_scale=SCALE)
INT8.block_table.copy_(RING.block_table)
VALID_INT8 = {"k": K, "v": V, **INT8.arguments(), **named(PACKING)}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSED = [
    *refusal.cases(VALID),
    refusal.Case("v", torch.ones(8, 1, 16), "kv_heads=2", "(8, 1, 16)"),
    refusal.Case("v", torch.ones(8, 2, 16).half(), "torch.float32", "torch.float16"),
    refusal.Case("k_cache", torch.ones(4, 4, 2, 8), "head_dim=16", "(4, 4, 2, 8)"),
    refusal.Case("k_cache", torch.ones(4, 4, 2, 16).bfloat16(), "float32", "bfloat16"),
    refusal.Case("v_cache", RING.v_cache.to(torch.int8), "torch.float32", "torch.int8"),
    refusal.Case("v_cache", torch.ones(5, 4, 2, 16), "pages=6", "(5, 4, 2, 16)"),
    refusal.Case("block_table", torch.full((2, 2), 6, dtype=torch.int32), "6", "got 6"),
    refusal.Case("block_table", torch.full((2, 2), -1, dtype=torch.int32), "0", "-1"),
    refusal.Case("block_table", torch.zeros(2, 0, dtype=torch.int32), "block_table", "0"),
    refusal.Case("cu_seqlens", int32(0, 3), "3", "2"),
    refusal.Case("cu_seqlens", int32(1, 3, 8), "0", "[1, 3, 8]"),
    refusal.Case("cu_seqlens", int32(0, 9, 8), "8", "[0, 9, 8]"),
    refusal.Case("cu_seqlens", int32(0, 3, 7), "tokens=8", "[0, 3, 7]"),
    refusal.Case("context_lens", int32(1, 2, 3), "batch=2", "(3,)"),
    refusal.Case("k_scale", SCALE, "None", "tensor"),
]
REFUSED_INT8 = [
    *(case for case in refusal.cases(VALID_INT8) if case.argument.endswith("scale")),
    refusal.Case("k_scale", None, "(kv_heads,)", "None"),
    refusal.Case("v_scale", None, "(kv_heads,)", "None"),
    refusal.Case("v_scale", torch.ones(3), "kv_heads=2", "(3,)"),
]


@pytest.mark.parametrize("case", REFUSED, ids=refusal.case_id)
def test_refuses(case):
    refusal.check(ops.store_kv_, VALID, case)


@pytest.mark.parametrize("case", REFUSED_INT8, ids=refusal.case_id)
def test_refuses_of_a_quantised_cache(case):
    refusal.check(ops.store_kv_, VALID_INT8, case)


@pytest.mark.parametrize("argument", ["k", "v", "k_cache", "v_cache"])
def test_refuses_grad(argument):
    refusal.check_refuses_grad(ops.store_kv_, VALID, argument)
