"""The backward of prefill_attention without a cache, in Triton: no atomics, sums in fixed order.

    p = exp(q . k * scale - lse)     d_p = d_out . v     d_s = p * (d_p - delta)
    d_q = scale * sum d_s k     d_k = scale * sum d_s q     d_v = sum p d_out

with delta = d_out . out - d_lse of each row. One kernel walks the keys of a query tile for d_q, one
the queries of a key tile, all heads of its group, for d_k and d_v: each computes p for itself, 14 *
head_dim operations a pair where the forward has 4. The op saves no outputs, so the forward runs
again: 18. 16384 tokens, 32/8 heads of 128, window 4096: 4.3 TFLOP, at peak rates 13.9 ms on an A100
and 4.4 ms on an H100 or H200; the 1.1 GB that are moved take 0.5, 0.3 and 0.2 ms. Not measured.
"""

import itertools

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.attention_gradient_tiles import (
    LOG2_E,
    add_keys,
    add_queries,
    load_tile,
)
from mistral_kernels.kernels.attention_tiles import (
    NO_WINDOW,
    SHARED_KB,
    find_sequence,
    loop_bounds,
)


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
    lse = tl.load(lse_ptr + flat, mask=mask_m, other=0.0) * LOG2_E
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

    scale_2 = scale * LOG2_E
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
    SETTLED: tl.constexpr,  # see add_queries
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
    scale_2 = scale * LOG2_E
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = add_queries(
        sums, k, v, key, start, interior, live, seqlen, window, scale_2, rows,
        True, EDGE_STAGES, SETTLED, CAUSAL, GROUP, HEAD_DIM, BLOCK_M,
    )  # fmt: skip
    sums = add_queries(
        sums, k, v, key, interior, right, live, seqlen, window, scale_2, rows,
        False, EDGE_STAGES, SETTLED, CAUSAL, GROUP, HEAD_DIM, BLOCK_M,
    )  # fmt: skip
    d_k, d_v = add_queries(
        sums, k, v, key, right, end, live, seqlen, window, scale_2, rows,
        True, EDGE_STAGES, SETTLED, CAUSAL, GROUP, HEAD_DIM, BLOCK_M,
    )  # fmt: skip

    # Keys before the sequence's start are seen by none.
    shown = (key >= oldest)[:, None]
    d_k, d_v = tl.where(shown, d_k, 0.0), tl.where(shown, d_v, 0.0)
    mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
    at = ((begin_64 + key) * kv_heads + kv_head)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(d_k_ptr + at, (d_k * scale).to(d_k_ptr.dtype.element_ty), mask=mask)
    tl.store(d_v_ptr + at, d_v.to(d_v_ptr.dtype.element_ty), mask=mask)


def tile_config(
    head_dim: int, group: int, dtype: torch.dtype, arch: tuple[int, int], *, keys_stay: bool
) -> dict[str, int | bool]:
    """Tiles, warps and stages of the d_q kernel, or of d_kv, where keys stay. Not measured.

    By 8 warps the two sums of d_kv are 64 registers a thread at head_dim 128 and 64 keys. Twice as
    long a tile stays on sm_90, where wgmma reads its operands from shared memory; d_kv would spill
    with 64 rows beside it. Of wider heads half as many keys stay, too few for wgmma in d_kv. Loops
    with masks have two stages on sm_90, and float32 tiny tiles, for the reasons told in
    prefill_attention's tile_config.
    """
    block_d = max(triton.next_power_of_2(head_dim), 16)
    wgmma = arch[0] in (9, 10) and dtype != torch.float32
    stays, moves, stages = 64, 64, 2
    if dtype == torch.float32:
        stays, moves, stages = 16, 16, 1
    elif block_d > 128:
        stays, moves = 32 if keys_stay else 64, 32
    elif wgmma:
        stays, moves, stages = (128, 32, 3) if keys_stay else (128, 64, 2)
    heads = triton.next_power_of_2(group)  # a tile holds whole tokens
    if keys_stay and heads > moves:
        stays, moves = min(stays, 64), heads
    elif not keys_stay:
        stays = max(stays, heads)
    limit = SHARED_KB.get(arch, 99) * 1024
    row_bytes = block_d * dtype.itemsize
    while 2 * (stays + moves + (stages - 1) * max(stays, moves)) * row_bytes > limit:
        if stages > 1:
            stages -= 1
        elif keys_stay:
            stays //= 2
        else:
            moves //= 2
    config = {
        "BLOCK_M": moves if keys_stay else stays,
        "BLOCK_N": stays if keys_stay else moves,
        "BLOCK_D": block_d,
        "EDGE_STAGES": 2 if wgmma else 1,
        "num_warps": 8,
        "num_stages": stages,
    }
    if not keys_stay:
        return config
    # sm_100 has no wgmma to wait for, and Triton 3.7 cannot compile the wait.
    return config | {"SETTLED": wgmma and arch[0] == 9 and stays >= 64}


def work(
    tokens: int, window: int, q_heads: int, kv_heads: int, head_dim: int, *, keys_stay: bool
) -> tuple[int, int]:
    """Bytes that the d_q kernel, or d_kv, moves in bf16, and operations on pairs that count."""
    pairs = sum(min(token + 1, window) for token in range(tokens)) * q_heads
    q_bytes, kv_bytes = (2 * tokens * heads * head_dim for heads in (q_heads, kv_heads))
    if keys_stay:
        return 2 * q_bytes + 4 * kv_bytes, 8 * pairs * head_dim
    return 5 * q_bytes + 2 * kv_bytes, 6 * pairs * head_dim  # `out` is float32


def max_group(head_dim: int) -> int:
    """The largest group whose rows of one token fit, twice and in float32, into 99 KiB."""
    return 64 if head_dim <= 128 else 32


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
    shape = {"CAUSAL": causal, "GROUP": group, "HEAD_DIM": head_dim}
    rows_stay, keys_stay = (
        shape | tile_config(head_dim, group, q.dtype, arch, keys_stay=stay)
        for stay in (False, True)
    )
    window = NO_WINDOW if window is None else min(window, NO_WINDOW)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    delta = torch.empty_like(lse)
    tiles = tokens // (rows_stay["BLOCK_M"] // group) + batch
    key_tiles = tokens // keys_stay["BLOCK_N"] + batch
    with torch.cuda.device_of(q):  # Triton launches on the current device
        prefill_attention_d_q_kernel[(tiles * kv_heads,)](
            q, k, v, d_out, out, lse, d_lse, delta, d_q, cu_seqlens, starts,
            batch, tiles, kv_heads, window, scale, *strides, **rows_stay,
        )  # fmt: skip
        prefill_attention_d_kv_kernel[(key_tiles * kv_heads,)](
            q, k, v, d_out, lse, delta, d_k, d_v, cu_seqlens, starts,
            batch, kv_heads, window, scale, *strides, **keys_stay,
        )  # fmt: skip


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mistral 7B's heads, and wider ones."""
    floats = {"out_ptr", "lse_ptr", "d_lse_ptr", "delta_ptr"}
    cases = []
    for head_dim, kernel in itertools.product(
        (128, 256), (prefill_attention_d_q_kernel, prefill_attention_d_kv_kernel)
    ):
        signature = {"cu_seqlens_ptr": "*i32", "scale": "fp32"}
        for name in kernel.arg_names[: kernel.arg_names.index("CAUSAL")]:
            if name in signature or name == "starts_ptr":
                continue
            pointer = "*fp32" if name in floats else "*bf16"
            signature[name] = pointer if name.endswith("_ptr") else "i32"
        constants = {"CAUSAL": True, "GROUP": 4, "HEAD_DIM": head_dim}
        keys_stay = kernel is prefill_attention_d_kv_kernel
        constants |= tile_config(head_dim, 4, torch.bfloat16, arch, keys_stay=keys_stay)
        wide = constants["BLOCK_N" if keys_stay else "BLOCK_M"] >= 64
        cases.append(
            {
                "case": f"bf16 {head_dim}",
                "kernel": kernel,
                "signature": signature,
                "constexprs": constants,
                "due": ("wgmma" if wide else "mma", *("cp_async",) * (constants["num_stages"] > 1)),
                "work": {
                    "16384 tokens, window 4096": work(16384, 4096, 32, 8, 128, keys_stay=keys_stay)
                }
                if head_dim == 128
                else {},
            }
        )
    return cases
