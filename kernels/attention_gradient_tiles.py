"""What tiles of keys give to d_q, and tiles of queries to d_k and d_v: the loops of the backward.

    p = exp2(q . k * scale - lse)     d_s = p * (d_out . v - delta)

with scale and lse in base 2. Sums grow in the order of positions.
"""

import triton
import triton.language as tl

from mistral_kernels.kernels.attention_tiles import LOG2_E


@triton.jit
def load_tile(row_ptr, rows, offs_d, mask_row, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(rows, BLOCK_D) elements at int64 offsets `rows`, 0 where masked."""
    ptrs = row_ptr + rows[:, None] + offs_d[None, :]
    PADDED: tl.constexpr = offs_d.shape[0] != HEAD_DIM
    if MASKED:
        tile = tl.load(ptrs, mask=mask_row[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    elif PADDED:
        tile = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def add_keys(
    d_q,  # (BLOCK_M, BLOCK_D) fp32
    q,
    d_out,
    lse,  # (BLOCK_M,), base 2; inf for rows that see nothing
    delta,
    start,  # first key of the first tile, a multiple of BLOCK_N
    stop,  # no tile begins here or later
    low,  # (BLOCK_M,): first and last key that a row sees
    high,
    live,  # first key that any row sees, and the number of keys
    seqlen,
    scale,  # base 2
    k_ptr,  # of key 0
    v_ptr,
    stride_k,
    stride_v,
    MASKED: tl.constexpr,
    EDGE_STAGES: tl.constexpr,  # of masked loops; None: as the kernel's
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds what tiles of keys give to d_q."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, q.shape[1])
    k_rows, v_rows = offs_n.to(tl.int64) * stride_k, offs_n.to(tl.int64) * stride_v
    for first in tl.range(start, stop, BLOCK_N, num_stages=EDGE_STAGES if MASKED else None):
        key = first + offs_n
        k_tile, v_tile = tl.cast(first, tl.int64) * stride_k, tl.cast(first, tl.int64) * stride_v
        mask_n = (key >= live) & (key < seqlen)
        k = load_tile(k_ptr + k_tile, k_rows, offs_d, mask_n, MASKED, HEAD_DIM)
        v = load_tile(v_ptr + v_tile, v_rows, offs_d, mask_n, MASKED, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
        if MASKED:
            seen = (key[None, :] >= low[:, None]) & (key[None, :] <= high[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        d_weights = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        d_scores = tl.exp2(scores) * (d_weights - delta[:, None])
        d_q = tl.dot(d_scores.to(q.dtype), k, d_q, input_precision="ieee")
    return d_q


@triton.jit
def add_queries(
    sums,  # d_k and d_v, (BLOCK_N, BLOCK_D) fp32
    k,
    v,
    key,  # (BLOCK_N,)
    start,  # first token of the first tile, a multiple of BLOCK_TOKENS
    stop,  # no tile begins here or later
    live,  # first token that sees any of the keys, and the number of tokens
    seqlen,
    window,
    scale,  # base 2
    rows,  # pointers to the rows of token 0 and first head of the group, and strides
    MASKED: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    SETTLED: tl.constexpr,  # d_k is waited for in each tile
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds what tiles of queries give to d_k and d_v; scores lie keys by rows."""
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // GROUP
    IDLE: tl.constexpr = BLOCK_M % GROUP != 0
    d_k, d_v = sums
    q_ptr, d_out_ptr, lse_ptr, delta_ptr, stride_q_token, stride_q_head, q_heads = rows
    row, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, k.shape[1])
    flat = row // GROUP * q_heads + row % GROUP
    q_rows = (row // GROUP).to(tl.int64) * stride_q_token
    q_rows += (row % GROUP).to(tl.int64) * stride_q_head
    for first in tl.range(start, stop, BLOCK_TOKENS, num_stages=EDGE_STAGES if MASKED else None):
        token = first + row // GROUP
        mask_m = (row < BLOCK_TOKENS * GROUP) & (token >= live) & (token < seqlen)
        q_tile, tile = tl.cast(first, tl.int64) * stride_q_token, tl.cast(first, tl.int64) * q_heads
        q = load_tile(q_ptr + q_tile, q_rows, offs_d, mask_m, MASKED or IDLE, HEAD_DIM)
        d_out = load_tile(
            d_out_ptr + tile * HEAD_DIM, flat * HEAD_DIM, offs_d, mask_m, MASKED or IDLE, HEAD_DIM
        )
        lse = tl.load(lse_ptr + tile + flat, mask=mask_m, other=float("-inf")) * LOG2_E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + tile + flat, mask=mask_m, other=0.0)

        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :]
        if MASKED and CAUSAL:
            distance = token[None, :] - key[:, None]
            scores = tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
        weights = tl.exp2(scores)
        d_v = tl.dot(weights.to(q.dtype), d_out, d_v, input_precision="ieee")
        d_weights = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        d_scores = weights * (d_weights - delta[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision="ieee")
        if SETTLED:
            # Always true, which the compilers do not know. In flight into the next tile, this
            # wgmma would make ptxas put a wait behind every one of the kernel (its note C7515).
            d_k = tl.where(first >= 0, d_k, 0.0)
    return d_k, d_v
