"""The backward of prefill_attention without a cache, in Triton: no atomics, sums in fixed order.

    p = exp(q . k * scale - lse)     d_p = d_out . v     d_s = p * (d_p - delta)
    d_q = scale * sum d_s k     d_k = scale * sum d_s q     d_v = sum p d_out

with delta = d_out . out - d_lse of each row. One kernel walks the keys of a query tile for d_q, one
the queries of a key tile, all heads of its group, for d_k and d_v: each computes p for itself, 14 *
head_dim operations a pair where the forward has 4. The op saves no outputs, so the forward runs
again: 18. 16384 tokens, 32/8 heads of 128, window 4096: 4.3 TFLOP, at peak rates 13.9 ms on an A100
and 4.4 ms on an H100 or H200; the 1.1 GB that are moved take 0.5, 0.3 and 0.2 ms. Not measured.
"""

import math

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.attention_gradient_tiles import add_keys, add_queries, load_tile
from mistral_kernels.kernels.attention_tiles import find_sequence, loop_bounds

LOG2_E = math.log2(math.e)
NO_WINDOW = 2**30
MAX_HEAD_DIM = 128  # four tiles are in shared memory at once
SHARED_KB = {(8, 0): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}  # of a processor; others 99


@triton.jit(do_not_specialize=["batch", "tiles", "kv_heads", "window"])
def prefill_attention_d_q_kernel(
    q_ptr,  # (tokens, q_heads, head_dim)
    k_ptr,  # (tokens, kv_heads, head_dim)
    v_ptr,
    d_out_ptr,  # (tokens, q_heads, head_dim), contiguous as all below
    out_ptr,  # (tokens, q_heads, head_dim) fp32
    lse_ptr,  # (tokens, q_heads) fp32
    d_lse_ptr,
    delta_ptr,  # (tokens, q_heads) fp32, written
    d_q_ptr,  # (tokens, q_heads, head_dim), written
    cu_seqlens_ptr,  # (batch + 1,) i32
    starts_ptr,  # (batch,) i32, or None
    batch,
    tiles,  # query tiles: tokens // BLOCK_TOKENS + batch
    kv_heads,
    window,
    scale,  # fp32
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows: GROUP heads of BLOCK_M // GROUP tokens
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,  # power of two, at least HEAD_DIM
    EDGE_STAGES: tl.constexpr,  # of loops with masks; None: num_stages
):
    """Grid (tiles * kv_heads,). A program owns one query tile of one kv head; long ones first."""
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) // kv_heads
    sequence, number = find_sequence(tile, cu_seqlens_ptr, batch, BLOCK_TOKENS)
    begin = tl.load(cu_seqlens_ptr + sequence)
    seqlen = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    first = number * BLOCK_TOKENS
    if first >= seqlen:
        return

    # Rows, and delta of each.
    row, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token = first + row // GROUP
    mask_m = (row < BLOCK_TOKENS * GROUP) & (token < seqlen)
    head = kv_head * GROUP + row % GROUP
    flat = (begin + token).to(tl.int64) * (kv_heads * GROUP) + head
    q_rows = (begin + token).to(tl.int64) * stride_q_token + head * stride_q_head
    q = load_tile(q_ptr, q_rows, offs_d, mask_m, True, HEAD_DIM)
    d_out = load_tile(d_out_ptr, flat * HEAD_DIM, offs_d, mask_m, True, HEAD_DIM)
    out = load_tile(out_ptr, flat * HEAD_DIM, offs_d, mask_m, True, HEAD_DIM)
    lse = tl.load(lse_ptr + flat, mask=mask_m, other=0.0) * 1.4426950408889634
    blind = lse == float("-inf")
    lse = tl.where(blind, float("inf"), lse)  # weights 0
    d_lse = tl.load(d_lse_ptr + flat, mask=mask_m, other=0.0)
    delta = tl.where(blind, 0.0, tl.sum(d_out.to(tl.float32) * out, axis=1) - d_lse)
    tl.store(delta_ptr + flat, delta, mask=mask_m)

    # Which keys: as in the forward.
    oldest = 0
    if starts_ptr is not None:
        oldest = tl.maximum(oldest, tl.load(starts_ptr + sequence))
    last = tl.minimum(first + BLOCK_TOKENS, seqlen) - 1
    low = tl.maximum(oldest, token - window + 1)
    live = tl.maximum(oldest, first - window + 1)
    full_low = tl.maximum(oldest, last - window + 1)
    if CAUSAL:
        high, live_stop, full_stop = token, last + 1, first + 1
    else:
        high, live_stop, full_stop = seqlen - 1 + 0 * token, seqlen, seqlen
    start, interior, right, end = loop_bounds(live, live_stop, full_low, full_stop, BLOCK_N)

    scale_2 = scale * 1.4426950408889634
    k_head = k_ptr + begin.to(tl.int64) * stride_k_token + kv_head * stride_k_head
    v_head = v_ptr + begin.to(tl.int64) * stride_v_token + kv_head * stride_v_head
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_q = add_keys(
        d_q, q, d_out, lse, delta, start, interior, low, high, live, seqlen, scale_2,
        k_head, v_head, stride_k_token, stride_v_token, True, EDGE_STAGES, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    d_q = add_keys(
        d_q, q, d_out, lse, delta, interior, right, low, high, live, seqlen, scale_2,
        k_head, v_head, stride_k_token, stride_v_token, False, EDGE_STAGES, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    d_q = add_keys(
        d_q, q, d_out, lse, delta, right, end, low, high, live, seqlen, scale_2,
        k_head, v_head, stride_k_token, stride_v_token, True, EDGE_STAGES, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    d_q_ptrs = d_q_ptr + flat[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(d_q_ptrs, (d_q * scale).to(d_q_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "kv_heads", "window"])
def prefill_attention_d_kv_kernel(
    q_ptr,  # as in prefill_attention_d_q_kernel
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    d_k_ptr,  # (tokens, kv_heads, head_dim), contiguous, written
    d_v_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    batch,
    kv_heads,
    window,
    scale,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
):
    """Grid (key tiles * kv_heads,). A program owns one key tile of one kv head."""
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    tile = tl.program_id(0) // kv_heads
    sequence, number = find_sequence(tile, cu_seqlens_ptr, batch, BLOCK_N)
    begin = tl.load(cu_seqlens_ptr + sequence)
    seqlen = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    first = number * BLOCK_N
    if first >= seqlen:
        return

    # Keys and values. Their sums are theirs alone: those behind the end are just not stored.
    offs_d = tl.arange(0, BLOCK_D)
    key = first + tl.arange(0, BLOCK_N)
    begin_64, mask_n = begin.to(tl.int64), key < seqlen
    k_rows = (begin_64 + key) * stride_k_token + kv_head * stride_k_head
    v_rows = (begin_64 + key) * stride_v_token + kv_head * stride_v_head
    k = load_tile(k_ptr, k_rows, offs_d, mask_n, True, HEAD_DIM)
    v = load_tile(v_ptr, v_rows, offs_d, mask_n, True, HEAD_DIM)

    # Which tokens see them: from the first key on, and before the window leaves the last one.
    live, live_stop, full_low, full_stop = 0 * seqlen, seqlen, 0 * seqlen, seqlen
    if CAUSAL:
        live, live_stop = first, tl.minimum(seqlen, first + BLOCK_N - 1 + window)
        full_low, full_stop = first + BLOCK_N - 1, tl.minimum(seqlen, first + window)
    oldest = 0
    if starts_ptr is not None:
        oldest = tl.load(starts_ptr + sequence)
        if CAUSAL:
            live, full_low = tl.maximum(live, oldest), tl.maximum(full_low, oldest)
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // GROUP
    start, interior, right, end = loop_bounds(live, live_stop, full_low, full_stop, BLOCK_TOKENS)

    q_heads, head = kv_heads * GROUP, kv_head * GROUP
    flat = begin_64 * q_heads + head
    rows = (
        q_ptr + begin_64 * stride_q_token + head * stride_q_head, d_out_ptr + flat * HEAD_DIM,
        lse_ptr + flat, delta_ptr + flat, stride_q_token, stride_q_head, q_heads,
    )  # fmt: skip
    scale_2 = scale * 1.4426950408889634
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = add_queries(
        sums, k, v, key, start, interior, live, seqlen, window, scale_2, rows,
        True, EDGE_STAGES, CAUSAL, GROUP, HEAD_DIM, BLOCK_M,
    )  # fmt: skip
    sums = add_queries(
        sums, k, v, key, interior, right, live, seqlen, window, scale_2, rows,
        False, EDGE_STAGES, CAUSAL, GROUP, HEAD_DIM, BLOCK_M,
    )  # fmt: skip
    d_k, d_v = add_queries(
        sums, k, v, key, right, end, live, seqlen, window, scale_2, rows,
        True, EDGE_STAGES, CAUSAL, GROUP, HEAD_DIM, BLOCK_M,
    )  # fmt: skip

    # Keys before the sequence's start are seen by none.
    shown = (key >= oldest)[:, None]
    d_k, d_v = tl.where(shown, d_k, 0.0), tl.where(shown, d_v, 0.0)
    mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
    at = ((begin_64 + key) * kv_heads + kv_head)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(d_k_ptr + at, (d_k * scale).to(d_k_ptr.dtype.element_ty), mask=mask)
    tl.store(d_v_ptr + at, d_v.to(d_v_ptr.dtype.element_ty), mask=mask)


def tile_config(
    head_dim: int, group: int, dtype: torch.dtype, arch: tuple[int, int]
) -> dict[str, int]:
    """Tiles, warps and stages of both kernels, which hold two tiles and stream two. Not measured.

    64 by 64 by 8 warps: the two sums of the d_kv kernel are 64 registers a thread at head_dim 128,
    scores and their gradients 32; 128 rows would spill.
    """
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_m, block_n, stages = 64, 64, 2
    if dtype == torch.float32:
        block_m, block_n, stages = 32, 32, 1
    block_m = max(block_m, triton.next_power_of_2(group))
    limit = SHARED_KB.get(arch, 99) * 1024
    row_bytes = block_d * dtype.itemsize
    while 2 * (block_m + block_n + (stages - 1) * max(block_m, block_n)) * row_bytes > limit:
        if stages > 1:
            stages -= 1
        else:
            block_n //= 2
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "EDGE_STAGES": None if arch[0] in (9, 10) else 1,
        "num_warps": 8,
        "num_stages": stages,
    }


def prefill_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    starts: torch.Tensor | None,
    window: int | None,
    causal: bool,
    scale: float,
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    d_v: torch.Tensor,
) -> None:
    """Writes the gradients d_q, d_k and d_v, each like its input but contiguous.

    Args:
        q, k, v, cu_seqlens, starts, window, causal, scale: those of the op.
        out, lse: what the forward returned for them, out in float32; contiguous.
        d_out, d_lse: like out and lse, d_out in q's dtype.
    """
    tokens, q_heads, head_dim = q.shape
    batch, kv_heads = len(cu_seqlens) - 1, k.shape[1]
    if q.numel() == 0:
        return
    group = q_heads // kv_heads
    arch = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    config = tile_config(head_dim, group, q.dtype, arch)
    config |= {"CAUSAL": causal, "GROUP": group, "HEAD_DIM": head_dim}
    window = NO_WINDOW if window is None else min(window, NO_WINDOW)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    delta = torch.empty_like(lse)
    tiles = tokens // (config["BLOCK_M"] // group) + batch
    key_tiles = tokens // config["BLOCK_N"] + batch
    with torch.cuda.device_of(q):  # Triton launches on the current device
        prefill_attention_d_q_kernel[(tiles * kv_heads,)](
            q, k, v, d_out, out, lse, d_lse, delta, d_q, cu_seqlens, starts,
            batch, tiles, kv_heads, window, scale, *strides, **config,
        )  # fmt: skip
        prefill_attention_d_kv_kernel[(key_tiles * kv_heads,)](
            q, k, v, d_out, lse, delta, d_k, d_v, cu_seqlens, starts,
            batch, kv_heads, window, scale, *strides, **config,
        )  # fmt: skip


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mistral 7B's heads, 32 and 8 of 128."""
    floats = {"out_ptr", "lse_ptr", "d_lse_ptr", "delta_ptr"}
    constants = {"CAUSAL": True, "GROUP": 4, "HEAD_DIM": 128}
    constants |= tile_config(128, 4, torch.bfloat16, arch)
    cases = []
    for kernel in (prefill_attention_d_q_kernel, prefill_attention_d_kv_kernel):
        signature = {"cu_seqlens_ptr": "*i32", "scale": "fp32"}
        for name in kernel.arg_names[: kernel.arg_names.index("CAUSAL")]:
            if name in signature or name == "starts_ptr":
                continue
            pointer = "*fp32" if name in floats else "*bf16"
            signature[name] = pointer if name.endswith("_ptr") else "i32"
        cases.append(
            {
                "case": "bf16",
                "kernel": kernel,
                "signature": signature,
                "constexprs": constants,
                "due": ("wgmma" if arch[0] == 9 else "mma", "cp_async"),
            }
        )
    return cases
