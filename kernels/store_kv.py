"""store_kv_ in Triton: new keys and values go to their slots of the ring, rounded if it is narrow.

A token moves 2 * kv_heads * head_dim * (itemsize + the cache's itemsize) bytes and computes
nothing, or a rounding: bound by memory. Predicted for 4096 tokens of 8 heads of 128 in bf16, 34 MB,
at the data sheets' bandwidth: A100 (2.0 TB/s) 17 us, H100 (3.35) 10 us, H200 (4.8) 7 us; into an
int8 or fp8 cache three quarters of that.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.cache_elements import as_codes, as_stored
from mistral_kernels.kernels.processor import processor


@triton.jit
def _rounded(
    x,  # (BLOCK_HEADS, BLOCK_DIM)
    cache_ptr,  # its element type says how: int8, uint8 for the bytes of e4m3fn, or x's own
    scale_ptr,  # (1,) or (kv_heads,) fp32
    offs_head,  # (BLOCK_HEADS, 1)
    mask_head,
    stride_scale,  # 0 for one scale
):
    stored: tl.constexpr = cache_ptr.dtype.element_ty
    if stored == x.dtype:
        out = x
    else:
        scale = tl.load(scale_ptr + offs_head * stride_scale, mask=mask_head, other=1.0)
        if stored == tl.int8:
            out = as_stored(x.to(tl.float32), scale, "int8")
        else:
            tl.static_assert(stored == tl.uint8)
            out = as_stored(x.to(tl.float32), scale, "fp8")
    return out


@triton.jit(do_not_specialize=["batch"])  # another batch must not compile it anew
def store_kv_kernel(
    k_ptr,  # (tokens, kv_heads, head_dim), last dimension contiguous
    v_ptr,  # like k
    k_cache_ptr,  # (pages, page_size, kv_heads, head_dim), last dimension contiguous
    v_cache_ptr,  # like k_cache
    block_table_ptr,  # (batch, pages_per_seq) i32
    cu_seqlens_ptr,  # (batch + 1,) i32
    context_lens_ptr,  # (batch,) i32
    k_scale_ptr,  # (1,) or (kv_heads,) fp32; None for a cache of k's dtype
    v_scale_ptr,  # like k_scale
    batch,  # i32
    kv_heads,  # i32
    head_dim,  # i32
    page_size,  # i32
    capacity,  # i32, slots of a sequence
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_k_cache_page,
    stride_k_cache_row,
    stride_k_cache_head,
    stride_v_cache_page,
    stride_v_cache_row,
    stride_v_cache_head,
    stride_table,
    stride_k_scale,
    stride_v_scale,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,  # power of two
    BLOCK_DIM: tl.constexpr,  # power of two, at least head_dim
):
    """Grid (tokens, cdiv(kv_heads, BLOCK_HEADS)). A program owns BLOCK_HEADS heads of one token."""
    token = tl.program_id(0)
    offs_head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    offs_dim = tl.arange(0, BLOCK_DIM)[None, :]
    mask_head = offs_head < kv_heads
    mask = mask_head & (offs_dim < head_dim)

    # Loads first: they take their time while the slot is found.
    k_row, v_row = token.to(tl.int64) * stride_k_token, token.to(tl.int64) * stride_v_token
    k = tl.load(k_ptr + k_row + offs_head * stride_k_head + offs_dim, mask=mask, other=0.0)
    v = tl.load(v_ptr + v_row + offs_head * stride_v_head + offs_dim, mask=mask, other=0.0)

    # As many sequences end at or before the token as there are in front of its own.
    sequence = 0
    for first in range(0, batch, BLOCK_BATCH):
        offs = first + tl.arange(0, BLOCK_BATCH)
        ends = tl.load(cu_seqlens_ptr + 1 + offs, mask=offs < batch, other=0x7FFFFFFF)
        sequence += tl.sum((ends <= token).to(tl.int32), axis=0)

    # Not stored: padding behind the last sequence, rows that the same call would overwrite, and
    # rows in front of position 0.
    known = sequence < batch
    begin = tl.load(cu_seqlens_ptr + sequence, mask=known, other=0)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=known, other=0)
    position = tl.load(context_lens_ptr + sequence, mask=known, other=-1) + token - begin
    kept = known & (token >= end - capacity) & (position >= 0)
    slot = tl.maximum(position, 0) % capacity
    table_row = block_table_ptr + sequence.to(tl.int64) * stride_table
    page = tl.load(table_row + slot // page_size, mask=kept, other=-1).to(tl.int64)
    row = (slot % page_size).to(tl.int64)  # page and row times a stride may pass 2^31
    mask = mask & kept & (page >= 0)

    k = _rounded(k, k_cache_ptr, k_scale_ptr, offs_head, mask_head, stride_k_scale)
    v = _rounded(v, v_cache_ptr, v_scale_ptr, offs_head, mask_head, stride_v_scale)
    k_slot = k_cache_ptr + page * stride_k_cache_page + row * stride_k_cache_row
    v_slot = v_cache_ptr + page * stride_v_cache_page + row * stride_v_cache_row
    tl.store(k_slot + offs_head * stride_k_cache_head + offs_dim, k, mask=mask)
    tl.store(v_slot + offs_head * stride_v_cache_head + offs_dim, v, mask=mask)


def tile_config(
    kv_heads: int, head_dim: int, dtype: torch.dtype, arch: tuple[int, int]
) -> dict[str, int]:
    """Heads a program and warps on compute capability `arch`; not measured.

    1024 elements of k and of v, all 8 heads of 128: one 16-byte bf16 load of each a thread, and
    the search for the sequence once a token. It looks at 128 sequences at a time.
    """
    block_dim = triton.next_power_of_2(head_dim)
    block_heads = max(min(1024 // block_dim, triton.next_power_of_2(kv_heads)), 1)
    warps = min(max(block_heads * block_dim // 256, 1), 16)
    tile = {"BLOCK_HEADS": block_heads, "BLOCK_DIM": block_dim, "BLOCK_BATCH": 128}
    return tile | {"num_warps": warps}


def work(tokens: int, kv_heads: int, head_dim: int, stored_bytes: int) -> tuple[int, int]:
    """Bytes that a call with bf16 rows moves, and its operations, which do not count."""
    return 2 * tokens * kv_heads * head_dim * (2 + stored_bytes), 0


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Writes to `k_cache` and `v_cache`; arguments as `ops.store_kv_` describes them."""
    tokens, kv_heads, head_dim = k.shape
    page_size, capacity = k_cache.shape[1], block_table.shape[1] * k_cache.shape[1]
    if k.numel() == 0 or context_lens.shape[0] == 0:
        return
    k_cache, v_cache = as_codes(k_cache), as_codes(v_cache)
    arch, _ = processor(k.device)
    config = tile_config(kv_heads, head_dim, k.dtype, arch)
    scale_steps = [int(s is not None and s.numel() > 1) for s in (k_scale, v_scale)]
    with torch.cuda.device_of(k):  # Triton launches on the current device
        store_kv_kernel[(tokens, triton.cdiv(kv_heads, config["BLOCK_HEADS"]))](
            k, v, k_cache, v_cache, block_table, cu_seqlens, context_lens, k_scale, v_scale,
            context_lens.shape[0], kv_heads, head_dim, page_size, capacity,
            *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            block_table.stride(0), *scale_steps,
            **config,
        )  # fmt: skip


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8 heads of 128 to each kind of cache."""
    numbers = [name for name in store_kv_kernel.arg_names if not name.endswith("_ptr")]
    cases = []
    for kind, stored, width in (("bf16", "bf16", 2), ("int8", "i8", 1), ("fp8", "u8", 1)):
        pointers = dict.fromkeys(("k_ptr", "v_ptr"), "*bf16")
        pointers |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), f"*{stored}")
        pointers |= dict.fromkeys(("block_table_ptr", "cu_seqlens_ptr", "context_lens_ptr"), "*i32")
        if kind != "bf16":
            pointers |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32")
        sizes = {name: "i32" for name in numbers if name.islower()}
        cases.append(
            {
                "case": f"bf16 in a cache of {kind}",
                "kernel": store_kv_kernel,
                "signature": pointers | sizes,
                "constexprs": tile_config(8, 128, torch.bfloat16, arch),
                # Rows of 8-bit codes end in halves of that.
                "due": ("load_16", "store_16") if width == 2 else ("load_16",),
                "work": {f"4096 tokens of 8 heads of 128 to {kind}": work(4096, 8, 128, width)},
            }
        )
    return cases
