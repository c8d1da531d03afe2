"""store_kv_'s Triton kernel in Triton's interpreter, around the edges of its tiles and its search.

`test_store_kv.py` and `test_quantised_codes.py` run the same backend there on the cases that every
backend gets; here the expectation is the reference, which those compare with a plain loop.
"""

import pytest
import ring
import torch
from tolerance import assert_same

from mistral_kernels import ops

pytestmark = pytest.mark.interpreter
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
# Sequences of 0, 1 and many tokens; the ring of 8 slots wrapped once, twice and within the call.
SEQLENS = (2, 0, 1, 10, 0, 0, 3)
CONTEXTS = (7, 3, 16, 5, 0, 9, -1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    from mistral_kernels.kernels import store_kv as kernel

    def tile_config(kv_heads, head_dim, *_):
        block_dim = 1 << (head_dim - 1).bit_length()
        return {"BLOCK_HEADS": 2, "BLOCK_DIM": block_dim, "BLOCK_BATCH": 2, "num_warps": 1}

    monkeypatch.setattr(kernel, "tile_config", tile_config)


def make_call(kv_heads: int, head_dim: int, dtype: torch.dtype, **layout: str) -> dict:
    """Return a call whose k and v lie between heads and columns of NaN."""
    wide = torch.full((sum(SEQLENS), 2 * kv_heads + 2, head_dim + 8), torch.nan).to(dtype)
    rows = wide[:, 1:-1, :head_dim]
    rows.copy_(torch.randn(rows.shape).mul(3))
    cache = ring.empty_ring(len(SEQLENS), 2, 4, kv_heads, head_dim, dtype=dtype, **layout)
    for sequence, (context, tokens) in enumerate(zip(CONTEXTS, SEQLENS, strict=True)):
        for position in range(max(context, 0), context + tokens):
            cache.place(sequence, position)
    return {
        "k": rows[:, :kv_heads],
        "v": rows[:, kv_heads:],
        **cache.arguments(),
        "cu_seqlens": torch.tensor([0, *SEQLENS]).cumsum(0, dtype=torch.int32),
        "context_lens": torch.tensor(CONTEXTS, dtype=torch.int32),
    }


def check_against_reference(call: dict) -> None:
    """Compare whole caches, slots that keep their poison included."""
    expected = call | {name: call[name].clone() for name in ("k_cache", "v_cache")}
    ops.store_kv_(**expected, backend="reference")
    ops.store_kv_(**call, backend="triton")
    for name in ("k_cache", "v_cache"):
        assert_same(call[name], expected[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 5])
def test_heads_around_a_tile(kv_heads, dtype):
    check_against_reference(make_call(kv_heads, 6, dtype))


@pytest.mark.parametrize("layout", ring.PAGE_LAYOUTS)
@pytest.mark.parametrize("head_dim", [1, 32, 64, 80, 96, 128, 256])
def test_every_head_dim(head_dim, layout):
    check_against_reference(make_call(1, head_dim, torch.bfloat16, layout=layout))


@pytest.mark.parametrize("scales", [1, 3], ids=["one scale", "scale a head"])
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised(dtype, cache_dtype, scales):
    k_scale, v_scale = torch.rand(scales) / 50, torch.rand(scales) / 50
    wide = make_call(3, 80, dtype)
    cache = ring.empty_ring(
        len(SEQLENS), 2, 4, 3, 80, dtype=cache_dtype, k_scale=k_scale, v_scale=v_scale
    )
    cache.block_table.copy_(wide["block_table"])
    check_against_reference(wide | cache.arguments())


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_stays_nan_in_fp8(sign):
    cache = ring.one_token_ring(1, 4, torch.float8_e4m3fn, "cpu")
    x = torch.tensor([1.0, torch.nan, -torch.inf, -0.0]).mul(sign).view(1, 1, 4)
    lens = torch.tensor([0, 1], dtype=torch.int32)
    ops.store_kv_(
        x, x, **cache.arguments(), cu_seqlens=lens, context_lens=lens[:1], backend="triton"
    )
    page, row = cache.place(0, 0)
    stored = (cache.k_cache[page, row, 0].float() * sign).tolist()
    assert stored[0] == 1 and stored[1] != stored[1] and stored[2] == -448 and stored[3] == 0


def test_rows_without_a_place_are_not_stored():
    # A captured graph has rows for the largest step: those behind the last sequence are padding.
    # The op refuses both on the CPU; on a GPU it cannot look.
    from mistral_kernels.kernels import store_kv as kernel

    cache = ring.empty_ring(2, 2, 4, 1, 8)
    cache.place(0, 0)
    assert cache.block_table[1].tolist() == [-1, -1]
    k, v = torch.randn(2, 5, 1, 8)
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    context_lens = torch.tensor([0, 0], dtype=torch.int32)
    where = (cache.k_cache, cache.v_cache, cache.block_table, cu_seqlens, context_lens)
    kernel.store_kv(k, v, *where, None, None)
    page, _ = cache.place(0, 0)
    assert_same(cache.k_cache[page, :2], k[:2], "k")
    assert_same(cache.v_cache[page, :2], v[:2], "v")
    cache.k_cache[page, :2] = torch.nan
    assert cache.k_cache.isnan().all(), "nothing else was written"


def test_tile_config(monkeypatch):
    monkeypatch.undo()
    from mistral_kernels.kernels import store_kv as kernel

    for kv_heads in (1, 5, 8, 96):
        for head_dim in (1, 80, 128, 256, 2048):
            config = kernel.tile_config(kv_heads, head_dim, torch.bfloat16, (9, 0))
            heads, dim = config["BLOCK_HEADS"], config["BLOCK_DIM"]
            assert head_dim <= dim < 2 * head_dim and heads < 2 * kv_heads
            assert heads * dim <= max(1024, dim) and config["num_warps"] in (1, 2, 4, 8, 16)
