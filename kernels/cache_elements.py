"""Elements of a rolling cache in Triton, and where they lie, for kernels that read or write one.

Keys go in after RoPE. An int8 or fp8 cache holds round(value / scale), saturating; fp8 is
handled by its bits, since below sm_89 there are no instructions for it.
"""

import torch
import triton
import triton.language as tl

CACHE_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def as_codes(cache: torch.Tensor) -> torch.Tensor:
    """A cache as the kernels take it: fp8 as its bytes, for Triton has no such type for sm_80."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


@triton.jit
def page_and_row(table_row, slot, mask, PAGE_SIZE: tl.constexpr):
    """Page and row within it of logical slots, int64.

    Entries of the table that are masked are not read: they may be -1.
    """
    page = tl.load(table_row + slot // PAGE_SIZE, mask=mask, other=0)
    return page.to(tl.int64), (slot % PAGE_SIZE).to(tl.int64)


@triton.jit
def load_turned(row_ptr, offs_d, mask, cos_row_ptr, sin_row_ptr, HEAD_DIM, INTERLEAVED):
    """Rows of a head at `row_ptr`, in fp32, each pair turned by the angle of cos and sin."""
    if INTERLEAVED:
        is_first = offs_d % 2 == 0
        pair = offs_d // 2
        partner = offs_d ^ 1
    else:
        is_first = offs_d < HEAD_DIM // 2
        pair = tl.where(is_first, offs_d, offs_d - HEAD_DIM // 2)
        partner = tl.where(is_first, offs_d + HEAD_DIM // 2, pair)
    own = tl.load(row_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(row_ptr + partner, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_row_ptr + pair, mask=offs_d < HEAD_DIM, other=0.0)
    sin = tl.load(sin_row_ptr + pair, mask=offs_d < HEAD_DIM, other=0.0)
    return own * cos + tl.where(is_first, -other, other) * sin


@triton.jit
def as_stored(value, scale, CACHE_FORMAT: tl.constexpr):
    """fp32 values as an int8 or fp8 cache holds them (fp8 as its bits): rounded, saturating."""
    value = tl.div_rn(value, scale)
    nearest: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds half to even
    if CACHE_FORMAT == "int8":
        value = tl.minimum(tl.maximum(value, -128.0), 127.0)
        stored = ((value + nearest) - nearest).to(tl.int8)
    else:
        # e4m3: 3 bits of mantissa, exponents -6..8, below that steps of 2^-9; 0x7F is NaN.
        size = tl.minimum(tl.abs(value), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        tiny = ((size * 512.0 + nearest) - nearest).to(tl.int32)
        code = tl.where(size < 0.015625, tiny, normal)
        code = tl.where(value == value, code, 0x7F)
        sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
        stored = (code | sign).to(tl.uint8)
    return stored


@triton.jit
def expanded(stored, dtype, CACHE_FORMAT: tl.constexpr):
    """Cache elements as q's dtype, exact but for the scale, and for fp8 but for a factor of 256.

    An e4m3 moved into the bits of an fp16, whose exponents are biased by 8 more, is worth 1/256.
    """
    if CACHE_FORMAT == "fp8":
        bits = stored.to(tl.uint16)
        size = bits & 0x7F
        moved = tl.where(size == 0x7F, 0x7E00, size << 7) | ((bits & 0x80) << 8)
        moved = moved.to(tl.uint16).to(tl.float16, bitcast=True)
        value = moved.to(tl.float32).to(dtype)
    elif CACHE_FORMAT == "int8":
        value = stored.to(tl.float32).to(dtype)
    else:
        value = stored
    return value
