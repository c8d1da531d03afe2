"""What every product with weights that are stored as (out, in) shares: its loop and its tiles."""

import triton
import triton.language as tl


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
    a_tile = a_rows[:, None] + offs_k[None, :]
    b_tile = b_rows[None, :] + offs_k[:, None]
    total, mask_n = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.full([BLOCK_N], True, tl.int1)
    return add_products(total, a_tile, mask_m, b_tile, BLOCK_K, mask_n, begin, end, EVEN_K, BLOCK_K)


@triton.jit
def add_products(
    total,  # (BLOCK_M, BLOCK_N) fp32
    a_tile,  # (BLOCK_M, BLOCK_K) pointers to the elements of the first step, rows of k
    mask_m,  # (BLOCK_M,) which rows count: the others are not read, and their products are 0
    b_tile,  # (BLOCK_K, BLOCK_N) pointers to the elements of the first step
    b_step,  # how far they move a step
    mask_n,  # (BLOCK_N,) which columns may be read; with EVEN all of them
    begin,
    end,
    EVEN: tl.constexpr,  # BLOCK_K divides end - begin, BLOCK_N the columns if a mask is needed
    BLOCK_K: tl.constexpr,
):
    """`total` and the sum over k in [begin, end), in order, of a[m, k] * b[k, n]."""
    for k in range(begin, end, BLOCK_K):
        if EVEN:
            a = tl.load(a_tile, mask=mask_m[:, None], other=0.0)
            b = tl.load(b_tile)
        else:
            mask_k = k + tl.arange(0, BLOCK_K) < end
            a = tl.load(a_tile, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_tile, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_tile += BLOCK_K
        b_tile += b_step
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
