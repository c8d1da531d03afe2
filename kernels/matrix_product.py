"""The inner loop of every product with weights that are stored as (out, in), summed in fp32."""

import triton
import triton.language as tl

# Bytes of shared memory that a block can have; 99 KB where a GPU is not listed.
SHARED_BYTES = dict.fromkeys([(8, 0), (8, 7)], 163 << 10)
SHARED_BYTES |= dict.fromkeys([(9, 0), (10, 0), (10, 3)], 227 << 10)


@triton.jit
def products(
    a_rows,  # (BLOCK_M,) pointers to rows of k
    b_rows,  # (BLOCK_N,) pointers to rows of k
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
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            mask_k = k + tl.arange(0, BLOCK_K) < end
            a = tl.load(a_ptrs, mask=mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return total
