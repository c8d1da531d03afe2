"""What every product with weights that are stored as (out, in) shares: its loop and its tiles."""

import triton
import triton.language as tl

# Bytes of shared memory that a block can have; 99 KB where a GPU is not listed.
SHARED_BYTES = dict.fromkeys([(8, 0), (8, 7)], 163 << 10)
SHARED_BYTES |= dict.fromkeys([(9, 0), (10, 0), (10, 3)], 227 << 10)


@triton.jit
def products(
    a_rows,  # (BLOCK_M,) pointers to rows of k
    mask_m,  # (BLOCK_M,) which of them count: the others are not read, and their products are 0
    b_rows,  # (BLOCK_N,) pointers to rows of k, all of them read
    begin,
    end,
    EVEN_K: tl.constexpr,  # BLOCK_K divides end - begin
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32: the sum over k in [begin, end), in order, of a[m, k] * b[n, k]."""
    offs_k = begin + tl.arange(0, BLOCK_K)
    a_ptrs = a_rows[:, None] + offs_k[None, :]
    b_ptrs = b_rows[None, :] + offs_k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(begin, end, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=mask_m[:, None], other=0.0)
            b = tl.load(b_ptrs)
        else:
            mask_k = k + tl.arange(0, BLOCK_K) < end
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return total


@triton.jit
def tile_place(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row tile and column tile of a program; behind the last tile, a row tile behind the last.

    Programs walk GROUP_M row tiles down before they go one column tile on: those run at the same
    time, so a tile of weights is read from memory once and shared in L2.
    """
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.maximum(tl.minimum(tiles_m - first_m, GROUP_M), 1)
    pid_m = first_m + pid % (GROUP_M * tiles_n) % height
    return pid_m, pid % (GROUP_M * tiles_n) // height
