"""Products with low-bit weights: for them what `matrix_product.products` is for plain ones.

The layout is that of `mistral_kernels.ops.low_bit`. A row of codes is read as 32-bit words of eight
(4-bit) or four codes, and unpacked in registers. Code i of all words of a step is a tile of weights
in x's dtype, to which belongs column i of each eight, or four, of x; with four:

    x       0   1   2   3 | 4   5   6   7 | 8 ...
    words   [ 3 2 1 0 ]     [ 7 6 5 4 ]     [ 11 ...        (bit 31 ... bit 0)
    tile 1      1               5               9 ...

So no weight changes its place between threads, as it would in one tile in x's order: with that
int4 takes 8.4 instructions a weight on sm_90, a quarter of which run at a quarter of the rate,
instead of 6.7. Rounding is that of `LowBit.dequantise`; of a row that is one group the codes, exact
in any dtype of x, are multiplied, and the sum is scaled.
"""

import triton
import triton.language as tl


@triton.jit
def low_bit_products(
    x_rows,  # (BLOCK_M,) pointers to rows of x
    mask_m,  # (BLOCK_M,) which of them count: the others are not read, and their products are 0
    word_rows,  # (BLOCK_N,) pointers to rows of words, all of them read
    scales_ptr,  # (experts * out, in_dim / group_size)
    zeros_ptr,  # the same; None: symmetric codes
    perm_ptr,  # (experts, in_dim) i32, columns of x in the codes' order; None: they are in order
    expert,  # whose row of perm; None without
    weight_row,  # (BLOCK_N,) i64: the rows of scales and zeros that belong to word_rows
    in_dim,
    group_size,
    begin,  # a multiple of BLOCK_K
    end,
    FORMAT: tl.constexpr,  # "int4", "int8" or "fp8"
    SPAN: tl.constexpr,  # columns of a step that share a scale; 0: all of a row
    EVEN_K: tl.constexpr,  # BLOCK_K divides end - begin
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) fp32: the sum over k in [begin, end) of x[m, k] * weight[n, k]."""
    CODES: tl.constexpr = 8 if FORMAT == "int4" else 4  # of a word
    WORDS: tl.constexpr = BLOCK_K // CODES
    GROUPS: tl.constexpr = BLOCK_K // SPAN if SPAN > 0 else 1  # of a step
    offs_k, offs_w = tl.arange(0, BLOCK_K), tl.arange(0, WORDS)
    offs_g = begin + tl.arange(0, GROUPS) * SPAN  # the first column of each group
    word_tile = word_rows[None, :] + begin // CODES + offs_w[:, None]
    # An e4m3 in the bits of an fp16, whose exponents are biased by 8 more, is worth 1/256. Scales
    # make up for it before a weight is rounded: a 256th of it would be subnormal in fp16.
    unit: tl.constexpr = 256.0 if FORMAT == "fp8" else 1.0
    weight_row *= in_dim // group_size
    zero = tl.full([GROUPS, BLOCK_N], 8.0 if FORMAT == "int4" else 0.0, tl.float32)
    if zeros_ptr is not None:
        zero = load_groups(zeros_ptr, weight_row, offs_g, group_size, end)
    if SPAN > 0:
        scale = load_groups(scales_ptr, weight_row, offs_g, group_size, end) * unit
    else:
        scale = tl.full([GROUPS, BLOCK_N], 1.0, tl.float32)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(begin, end, BLOCK_K):
        column = k + offs_k
        mask_k, mask_w = column < end, k + offs_w * CODES < end
        if perm_ptr is not None:
            perm_row = perm_ptr + expert.to(tl.int64) * in_dim
            column = tl.load(perm_row + column, mask=mask_k, other=0)
        x_tile = x_rows[:, None] + column[None, :]
        if EVEN_K:
            x = tl.load(x_tile, mask=mask_m[:, None], other=0.0)
            words = tl.load(word_tile)
        else:
            x = tl.load(x_tile, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            words = tl.load(word_tile, mask=mask_w[:, None], other=0)
        own_scale, own_zero = scale, zero
        if SPAN > 0:
            # A step ahead: Triton's pipeline has no place for elements of two bytes.
            offs_g += BLOCK_K
            scale = load_groups(scales_ptr, weight_row, offs_g, group_size, end) * unit
            if zeros_ptr is not None:
                zero = load_groups(zeros_ptr, weight_row, offs_g, group_size, end)
        columns = columns_of_words(x, CODES, BLOCK_M, WORDS)
        for i in tl.static_range(CODES):
            weight = unpacked(words, own_scale, own_zero, i, FORMAT, GROUPS, BLOCK_N, WORDS)
            total = tl.dot(columns[i], weight.to(x.dtype), total, input_precision="ieee")
        word_tile += WORDS
    if SPAN == 0:
        total *= tl.load(scales_ptr + weight_row).to(tl.float32)[None, :] * unit
    return total


@triton.jit
def load_groups(values_ptr, first, offs_g, group_size, end):
    """(GROUPS, BLOCK_N) fp32: scales or zeros of rows that begin at `first`, 0 from `end` on."""
    places = first[None, :] + (offs_g // group_size)[:, None]
    return tl.load(values_ptr + places, mask=(offs_g < end)[:, None], other=0.0).to(tl.float32)


@triton.jit
def columns_of_words(x, CODES: tl.constexpr, BLOCK_M: tl.constexpr, WORDS: tl.constexpr):
    """For each code of a word the columns of x that belong to it, (BLOCK_M, WORDS)."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_M, WORDS * CODES // 2, 2)))
    x0, x2 = tl.split(tl.reshape(even, (BLOCK_M, WORDS * CODES // 4, 2)))
    x1, x3 = tl.split(tl.reshape(odd, (BLOCK_M, WORDS * CODES // 4, 2)))
    if CODES == 4:
        return x0, x1, x2, x3
    else:
        x0, x4 = tl.split(tl.reshape(x0, (BLOCK_M, WORDS, 2)))
        x1, x5 = tl.split(tl.reshape(x1, (BLOCK_M, WORDS, 2)))
        x2, x6 = tl.split(tl.reshape(x2, (BLOCK_M, WORDS, 2)))
        x3, x7 = tl.split(tl.reshape(x3, (BLOCK_M, WORDS, 2)))
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def unpacked(
    words,  # (WORDS, BLOCK_N)
    scale,  # (GROUPS, BLOCK_N)
    zero,  # (GROUPS, BLOCK_N)
    NUMBER: tl.constexpr,  # of a code in its word
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
):
    """(WORDS, BLOCK_N) fp32: (code NUMBER of each word - zero) * scale, fp8 codes as 256ths."""
    if FORMAT == "fp8":
        # Bytes 0 and 2, or 1 and 3: each half of the word becomes an fp16.
        pair = words if NUMBER % 2 == 0 else words >> 8
        halves = ((pair & 0x00800080) << 8) | ((pair & 0x007F007F) << 7)
        half = halves if NUMBER < 2 else halves >> 16
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return value * by_words(scale, GROUPS, BLOCK_N, WORDS)
    else:
        # 2^23 + n in fp32 is 2^23's bits with those of n at their end, n < 2^23: a code is masked
        # where it lies in its half of the word, and counts `unit` times.
        BITS: tl.constexpr = 4 if FORMAT == "int4" else 8
        AT: tl.constexpr = BITS * NUMBER % 16
        unit: tl.constexpr = 2**AT
        bias: tl.constexpr = 0 if FORMAT == "int4" else 128
        if FORMAT == "int8":
            words = words ^ -0x7F7F7F80  # 0x80 in each byte: codes -128 .. 127 become 0 .. 255
        half = words if BITS * NUMBER < 16 else words >> 16
        value = ((half & ((2**BITS - 1) << AT)) | 0x4B000000).to(tl.float32, bitcast=True)
        value -= by_words(8388608.0 + (zero + bias) * unit, GROUPS, BLOCK_N, WORDS)
        return value * by_words(scale * (1 / unit), GROUPS, BLOCK_N, WORDS)


@triton.jit
def by_words(values, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr):
    """(GROUPS, BLOCK_N) -> (WORDS, BLOCK_N): to each word its group's value."""
    if GROUPS == 1:
        return tl.broadcast_to(values, (WORDS, BLOCK_N))
    else:
        each: tl.constexpr = WORDS // GROUPS
        values = tl.broadcast_to(values[:, None, :], (GROUPS, each, BLOCK_N))
        return tl.reshape(values, (WORDS, BLOCK_N))
