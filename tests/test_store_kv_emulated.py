"""The shipped csrc/cuda/store_kv.cu on the host emulator.

It must store the very bits of the reference, which `test_store_kv.py` compares with a plain loop.
"""

import pytest
import ring
import torch
from emulator.guard_bands import GuardBands
from emulator.host_build import emulated_core, missing
from test_quantised_codes import rounded, rounding_cases
from test_store_kv import CHUNKS, check, packed, prepared, write_in_order
from test_store_kv_interpreted import DTYPES, QUANTISED, SEQLENS, make_call
from tolerance import assert_same

from mistral_kernels import ops
from mistral_kernels.ops.store_kv import _store_kv_native

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def emulate(
    k, v, k_cache, v_cache, block_table, cu_seqlens, context_lens, k_scale=None, v_scale=None,
    device=0,
):  # fmt: skip
    """Store to both caches; check that nothing beside their rows was written."""
    with GuardBands() as guard:
        inputs = map(guard, (block_table, cu_seqlens, context_lens, k_scale, v_scale))
        caches = [guard(cache, mutated=True) for cache in (k_cache, v_cache)]
        launch = emulated_core().store_kv_cuda
        _store_kv_native(launch, guard(k), guard(v), *caches, *inputs, device, 0)
    k_cache.copy_(caches[0])
    v_cache.copy_(caches[1])


def check_against_reference(call: dict) -> None:
    """Compare whole caches, slots that keep their poison included."""
    expected = call | {name: call[name].clone() for name in ("k_cache", "v_cache")}
    ops.store_kv_(**expected, backend="reference")
    emulate(**call)
    for name in ("k_cache", "v_cache"):
        assert_same(call[name], expected[name], name)


def quantised_call(cache_dtype, scales, kv_heads, head_dim, dtype) -> dict:
    """Return `make_call`'s call with a quantised cache, its scales about right for the values."""
    wide = make_call(kv_heads, head_dim, dtype)
    scale = {name: torch.rand(scales) / 50 + 1e-3 for name in ("k_scale", "v_scale")}
    cache = ring.empty_ring(len(SEQLENS), 2, 4, kv_heads, head_dim, dtype=cache_dtype, **scale)
    cache.block_table.copy_(wide["block_table"])
    return wide | cache.arguments()


@pytest.mark.parametrize("layout", ring.PAGE_LAYOUTS)
@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: chunk.name)
def test_store_kv(chunk, layout):
    k, v, *packing = packed(chunk, dtype=torch.bfloat16)
    got, expected = prepared(chunk, dtype=torch.bfloat16, layout=layout)
    emulate(k, v, *got.arguments().values(), *packing)
    write_in_order(expected, k, v, *packing)
    check(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ring.PAGE_LAYOUTS)
@pytest.mark.parametrize("head_dim", [1, 6, 32, 64, 80, 96, 128, 256])
def test_every_head_dim(head_dim, layout, dtype):
    check_against_reference(make_call(2, head_dim, dtype, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 3, 8, 9])
def test_heads_around_a_block(kv_heads, dtype):
    check_against_reference(make_call(kv_heads, 128, dtype))


@pytest.mark.parametrize("scales", [1, 3], ids=["one scale", "scale a head"])
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [6, 80])
def test_quantised(head_dim, dtype, cache_dtype, scales):
    check_against_reference(quantised_call(cache_dtype, scales, 3, head_dim, dtype))


@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_every_rounding_case_is_stored_as_torch_rounds_it(cache_dtype):
    x = rounding_cases(cache_dtype).expand(1, 3, -1)
    cache = ring.one_token_ring(3, x.shape[-1], cache_dtype, "cpu")
    lens = torch.tensor([0, 1], dtype=torch.int32)
    emulate(x, -x, **cache.arguments(), cu_seqlens=lens, context_lens=lens[:1])
    page, row = cache.place(0, 0)
    assert_same(cache.k_cache[page, row], rounded(x[0], cache_dtype), "k")
    assert_same(cache.v_cache[page, row], rounded(-x[0], cache_dtype), "v")


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_stored_in_fp8_as_the_reference_does(sign):
    x = torch.tensor([1.0, torch.nan, -torch.inf, -0.0]).mul(sign).view(1, 1, 4)
    lens = torch.tensor([0, 1], dtype=torch.int32)
    cache = ring.one_token_ring(1, 4, torch.float8_e4m3fn, "cpu")
    call = {"k": x, "v": x, "cu_seqlens": lens, "context_lens": lens[:1], **cache.arguments()}
    check_against_reference(call)


@pytest.mark.parametrize("cache_dtype", [None, *QUANTISED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moved", ["k", "v", "k_cache", "v_cache"])
def test_misaligned_rows(moved, dtype, cache_dtype):
    # From an odd element on, and with an odd stride.
    call = make_call(2, 32, dtype)
    if cache_dtype is not None:
        call = quantised_call(cache_dtype, 2, 2, 32, dtype)
    values = call[moved]
    odd = torch.zeros(*values.shape[:-1], 35, dtype=values.dtype)[..., 1:33]
    odd.copy_(values)
    check_against_reference(call | {moved: odd})


def test_any_order_of_threads(orders):
    for chunk in CHUNKS[::4]:
        test_store_kv(chunk, "head-major")
    test_sequences_around_a_warp(65)


@pytest.mark.parametrize("batch", [31, 32, 33, 65, 130])
def test_sequences_around_a_warp(batch):
    # Every third sequence has no row, and the last ones none at all.
    seqlens = [0 if i % 3 == 1 or i > batch - 3 else 1 for i in range(batch)]
    cache = ring.empty_ring(batch, 1, 4, 1, 8)
    context_lens = torch.arange(batch, dtype=torch.int32) % 7
    for sequence, context in enumerate(context_lens.tolist()):
        cache.place(sequence, context)
    k, v = torch.randn(2, sum(seqlens), 1, 8)
    cu_seqlens = torch.tensor([0, *seqlens]).cumsum(0, dtype=torch.int32)
    packing = {"cu_seqlens": cu_seqlens, "context_lens": context_lens}
    check_against_reference({"k": k, "v": v, **cache.arguments(), **packing})


def test_rows_before_the_start_are_not_stored():
    # All slots have their page, so only the positions, from -3 on, keep those rows out.
    k, v = torch.randn(2, 5, 1, 8)
    cache = ring.empty_ring(1, 1, 4, 1, 8)
    cache.place(0, 0)
    lens = torch.tensor([-3, 0, 5], dtype=torch.int32)
    call = {"k": k, "v": v, **cache.arguments(), "cu_seqlens": lens[1:], "context_lens": lens[:1]}
    check_against_reference(call)
    page, _ = cache.place(0, 0)
    assert cache.k_cache[page, 2:].isnan().all() and not cache.k_cache[page, :2].isnan().any()


def test_rows_without_a_place_are_not_stored():
    # A captured graph has rows for the largest step: those behind the last sequence are padding.
    # The op refuses both on the CPU; on a GPU it cannot look.
    cache = ring.empty_ring(2, 2, 4, 1, 8)
    cache.place(0, 0)
    assert cache.block_table[1].tolist() == [-1, -1]
    k, v = torch.randn(2, 5, 1, 8)
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    context_lens = torch.tensor([0, 0], dtype=torch.int32)
    emulate(k, v, **cache.arguments(), cu_seqlens=cu_seqlens, context_lens=context_lens)
    page, _ = cache.place(0, 0)
    assert_same(cache.k_cache[page, :2], k[:2], "k")
    assert_same(cache.v_cache[page, :2], v[:2], "v")
    cache.k_cache[page, :2] = torch.nan
    assert cache.k_cache.isnan().all(), "nothing else was written"


def test_an_unknown_device_is_an_error_that_names_the_op():
    with pytest.raises(RuntimeError, match="store_kv_: CUDA error: cudaErrorInvalidDevice"):
        emulate(**make_call(1, 8, torch.float32), device=1)
