"""What the kernels of prefill_attention do with a query tile: find it, and walk the key tiles.

Key tiles are aligned to absolute positions and walked in order, so that a row's sums depend neither
on where its ring wraps nor on how large it is. Those outside of the window are not visited.
"""

import math

import triton
import triton.language as tl

from mistral_kernels.kernels.cache_elements import expanded, page_and_row

MAX_HEAD_DIM = 256  # a query tile and its sums live in registers
NO_WINDOW = 2**30  # no position is so far, and sums with one stay below 2^31
LOG2_E = tl.constexpr(math.log2(math.e))


def max_group(head_dim: int) -> int:
    """The largest group whose rows of one token fit into registers and 99 KB of shared memory."""
    return 64 if head_dim <= 128 else 32


@triton.jit
def find_sequence(tile, cu_seqlens_ptr, batch, BLOCK_TOKENS: tl.constexpr):
    """The sequence that a query tile belongs to, and the tile's number in it.

    Sequence b's tiles begin at cu_seqlens[b] // BLOCK_TOKENS + b, so that each has tiles enough and
    no sum over the batch is needed. Seqlens 5, 0, 3 in tiles of 4 tokens begin at 0, 2 and 3.
    """
    sequence, stop = 0, batch
    while stop - sequence > 1:
        middle = (sequence + stop) // 2
        before = tl.load(cu_seqlens_ptr + middle) // BLOCK_TOKENS + middle <= tile
        sequence = tl.where(before, middle, sequence)
        stop = tl.where(before, stop, middle)
    return sequence, tile - tl.load(cu_seqlens_ptr + sequence) // BLOCK_TOKENS - sequence


@triton.jit
def attend_tiles(
    state,  # acc (BLOCK_M, BLOCK_D), row_max and row_sum (BLOCK_M,), fp32; row_max in base 2
    q,  # (BLOCK_M, BLOCK_D)
    start,  # position of the first tile's first key, a multiple of BLOCK_N
    stop,  # no tile begins here or later
    live,  # first position of the source and the one after its last
    live_stop,
    low,  # (BLOCK_M,): first and last position that a row sees of the source; None: all of it
    high,
    scale,  # of the scores, base 2
    keys,  # pointers to a head's first row, strides of rows and pages, page table, capacity
    MASKED: tl.constexpr,  # False: every row sees every key of these tiles
    EDGE_STAGES: tl.constexpr,  # of masked loops; None: as the kernel's
    FROM_RING: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: the pointers are to the only page
    CACHE_FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds tiles of keys to the running softmax."""
    acc, row_max, row_sum = state
    k_ptr, v_ptr, stride_k, stride_v, stride_k_page, stride_v_page, table_ptr, capacity = keys
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, q.shape[1])
    # A ring's live positions lie fewer than `capacity` behind its last, so that slots counted from
    # that one's wrap at most once.
    to_slot = 0
    if FROM_RING:
        to_slot = (live_stop - 1) % capacity - (live_stop - 1)
    # What is masked may be NaN and is replaced by 0.
    OTHER: tl.constexpr = 0 if MASKED or q.shape[1] != HEAD_DIM else None
    for first in tl.range(start, stop, BLOCK_N, num_stages=EDGE_STAGES if MASKED else None):
        # Where the keys lie, in 64 bits: some strides are long.
        position = first + offs_n
        mask_n = (position >= live) & (position < live_stop)
        if FROM_RING:
            k_base, v_base = k_ptr, v_ptr
            row = position + to_slot
            row = tl.where(row < 0, row + capacity, row)
        else:
            k_base = k_ptr + tl.cast(first, tl.int64) * stride_k
            v_base = v_ptr + tl.cast(first, tl.int64) * stride_v
            row = offs_n
        if PAGE_SIZE:
            page, row = page_and_row(table_ptr, row, mask_n, PAGE_SIZE)
            k_base += (page * stride_k_page)[:, None]
            v_base += (page * stride_v_page)[:, None]
        row = row.to(tl.int64)
        k_ptrs = k_base + (row * stride_k)[:, None] + offs_d[None, :]
        v_ptrs = v_base + (row * stride_v)[:, None] + offs_d[None, :]

        mask = None
        if MASKED:
            mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        elif OTHER is not None:
            mask = (offs_d < HEAD_DIM)[None, :]

        # Scores. Keys outside of a row's window are left out by select.
        k = expanded(tl.load(k_ptrs, mask=mask, other=OTHER), q.dtype, CACHE_FORMAT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = mask_n[None, :]
            if low is not None:
                seen = (position[None, :] >= low[:, None]) & (position[None, :] <= high[:, None])
            scores = tl.where(seen, scores, float("-inf"))

        # Online softmax. Of a row that has seen nothing yet, -inf - 0 leaves exp2 at 0.
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
        shift = new_max
        if MASKED:
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * scale - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        row_max = new_max
        v = expanded(tl.load(v_ptrs, mask=mask, other=OTHER), q.dtype, CACHE_FORMAT)
        acc = tl.dot(weights.to(q.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def loop_bounds(live, live_stop, full_low, full_stop, BLOCK: tl.constexpr):
    """Where three loops over tiles of live .. live_stop - 1 meet: left edge, interior, right edge.

    Interior tiles lie within full_low .. full_stop - 1 and need no masks. Nothing live: no tiles.
    """
    end = tl.where(live < live_stop, live_stop, 0)
    interior = (tl.minimum(tl.maximum(live, full_low), end) + BLOCK - 1) // BLOCK * BLOCK
    right = tl.maximum(interior, tl.minimum(end, full_stop) // BLOCK * BLOCK)
    return live // BLOCK * BLOCK, interior, right, end


@triton.jit
def attend_source(
    state,
    q,
    live,
    live_stop,
    low,
    high,
    full_low,  # positions from full_low to before full_stop are seen by every row
    full_stop,
    scale,
    keys,
    EDGE_STAGES: tl.constexpr,
    FROM_RING: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CACHE_FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attends one source, ring or new keys, in three loops: left edge, interior, right edge."""
    low, high = tl.maximum(low, live), tl.minimum(high, live_stop - 1)
    start, interior, right, end = loop_bounds(live, live_stop, full_low, full_stop, BLOCK_N)
    state = attend_tiles(
        state, q, start, interior, live, live_stop, low, high, scale, keys,
        True, EDGE_STAGES, FROM_RING, PAGE_SIZE, CACHE_FORMAT, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    state = attend_tiles(
        state, q, interior, right, live, live_stop, low, high, scale, keys,
        False, EDGE_STAGES, FROM_RING, PAGE_SIZE, CACHE_FORMAT, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    return attend_tiles(
        state, q, right, end, live, live_stop, low, high, scale, keys,
        True, EDGE_STAGES, FROM_RING, PAGE_SIZE, CACHE_FORMAT, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
