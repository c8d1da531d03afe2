"""linear_low_bit in Triton: out[row, o] = sum over i of x[row, i] * weight[o, i].

A call reads in * out codes of 4 or 8 bits, a scale for each group, x and out beside them, and does
2 * rows * in * out operations. Mistral 7B's gate projection (4096 to 14336) at the data sheets'
2.0, 3.35, 4.8 TB/s and 312, 989, 989 TFLOP/s of A100, H100, H200; behind each what the instructions
that unpack take, 128 lanes of 108, 132, 132 multiprocessors at 1.4, 1.7, 1.7 GHz (not measured):

    format      rows    MB     A100        H100        H200, us
    int4 g128    1, 4   30     15 / 20      9 / 14      6 / 14    instructions
                   16   31     15 / 20      9 / 14      6 / 14    instructions
                   64   33     24 / 27     10 / 17      8 / 17    instructions
    int8         1, 4   59     29 / 18     18 / 12     12 / 12    memory
                   16   59     29 / 18     18 / 12     12 / 12    memory
                   64   61     30 / 27     18 / 13     13 / 13    memory

In bf16 the same weight takes 58, 35, 24 us. The sum over `in` is never cut, so it has one order.
Many rows have no other path: a weight of bf16 in between would be written and read once more, 0.1,
0.07, 0.05 ms, where each 128 rows are unpacked anew, 32 times 18 us for 4,096 beside 0.49 ms of
products (H100); which is faster is to be measured.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.low_bit_codes import (
    as_codes,
    codegen_arguments,
    low_bit_tiles,
    weight_bytes,
)
from mistral_kernels.kernels.low_bit_product import low_bit_products
from mistral_kernels.kernels.matrix_product import tile_place
from mistral_kernels.kernels.processor import processor


@triton.jit(do_not_specialize=["rows"])  # a batch of one must not compile it anew
def linear_low_bit_kernel(
    x_ptr,  # (rows, in_dim), last dimension contiguous
    words_ptr,  # (out_dim, words a row) i32, contiguous
    scales_ptr,  # (out_dim, groups), contiguous
    zeros_ptr,  # (out_dim, groups) u8 or i8, contiguous; None: symmetric codes
    out_ptr,  # (rows, out_dim), contiguous
    rows,  # i32
    in_dim,  # i32
    out_dim,  # i32
    group_size,  # i32
    stride_x_row,
    stride_words_row,
    FORMAT: tl.constexpr,
    SPAN: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides in_dim
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (row tiles * column tiles,). A program owns one tile of out."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_dim, BLOCK_N)
    pid_m, pid_n = tile_place(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)

    mask_m, row = offs_m < rows, offs_m.to(tl.int64)  # row * stride may pass 2^31
    # Columns behind the last are the last once more, so that their loads need no mask.
    weight_row = tl.minimum(offs_n, out_dim - 1).to(tl.int64)
    total = low_bit_products(
        x_ptr + row * stride_x_row,
        mask_m,
        words_ptr + weight_row * stride_words_row,
        scales_ptr,
        zeros_ptr,
        None,  # x is in the codes' order
        None,
        weight_row,
        in_dim,
        group_size,
        0,
        in_dim,
        FORMAT,
        SPAN,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    out_ptrs = out_ptr + row[:, None] * out_dim + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < out_dim)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def tile_config(
    rows: int, dtype: torch.dtype, arch: tuple[int, int], format: str
) -> dict[str, int]:
    """Tiles of `rows` rows on compute capability `arch`; not measured."""
    return low_bit_tiles(rows, dtype, arch, format)


def work(
    rows: int, in_dim: int, out_dim: int, format: str, group_size: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that a call moves, scales of two bytes, and its operations."""
    moved = in_dim * out_dim * weight_bytes(format, group_size)
    moved += rows * (in_dim + out_dim) * dtype.itemsize
    return round(moved), 2 * rows * in_dim * out_dim


def linear_low_bit(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    perm: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes `out`.

    Args:
        x: (rows, in), any float dtype, last dimension contiguous.
        qweight: (out, in / 2) uint8, or (out, in) int8 or float8_e4m3fn, in whole words.
        scales, zeros, perm: as in `ops.low_bit`, contiguous; zeros and perm may be None.
        out: (rows, out), x's dtype, contiguous; rows may be several dimensions.
    """
    (rows, in_dim), out_dim = x.shape, len(qweight)
    if out.numel() == 0:
        return
    if in_dim == 0:
        out.zero_()  # of no columns there are no groups
        return
    if perm is not None:
        x = x.index_select(1, perm)  # once, not once more in each column tile
    weight, (arch, _) = as_codes(qweight, scales, zeros, None), processor(x.device)
    config = tile_config(rows, x.dtype, arch, weight.format)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(out_dim, config["BLOCK_N"])
    with torch.cuda.device_of(x):  # Triton launches on the current device
        linear_low_bit_kernel[(tiles,)](
            x,
            weight.words,
            weight.scales,
            weight.zeros,
            out,
            rows,
            in_dim,
            out_dim,
            weight.group_size,
            x.stride(0),
            weight.words.stride(0),
            FORMAT=weight.format,
            SPAN=weight.span(config["BLOCK_K"]),
            EVEN_K=in_dim % config["BLOCK_K"] == 0,
            **config,
        )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: tiles and formats of a 7B's gate."""
    bf16, numbers = torch.bfloat16, [n for n in linear_low_bit_kernel.arg_names if n.islower()]
    cases = []
    for rows, dtype, name, format, group_size, with_zeros, rare in (
        (16, bf16, "bf16", "int4", 32, True, False),
        (16, bf16, "bf16", "fp8", 4096, False, True),
        (16, torch.float32, "fp32", "int4", 128, False, True),
        (64, torch.float32, "fp32", "int8", 4096, False, True),
        (1, bf16, "bf16", "int8", 4096, False, False),
        (1, bf16, "bf16", "int4", 128, False, False),
        (4, bf16, "bf16", "int4", 128, False, True),
        (32, bf16, "bf16", "int4", 128, False, True),
        (64, bf16, "bf16", "int4", 128, False, True),
        (4096, bf16, "bf16", "int8", 4096, False, True),
        (4096, bf16, "bf16", "int4", 128, False, False),
    ):
        config = tile_config(rows, dtype, arch, format)
        low = codegen_arguments(format, group_size, 4096, config["BLOCK_K"], with_zeros)
        types = dict.fromkeys(numbers, "i32") | low[0]
        types |= {"x_ptr": f"*{name}", "out_ptr": f"*{name}", "words_ptr": "*i32"}
        headline = name == "bf16" and not with_zeros and format != "fp8"
        moved = work(rows, 4096, 14336, format, group_size, dtype)
        due = "wgmma" if config["BLOCK_M"] >= 64 else "mma"
        cases.append(
            {
                "case": f"{name} {format} in {group_size}, {rows}",
                "kernel": linear_low_bit_kernel,
                "signature": types,
                "constexprs": {**config, **low[1], "EVEN_K": True},
                "due": ("load_16", "cp_async", due) if name == "bf16" else ("load_16",),
                "work": {f"{format}, {rows} rows, 4096 to 14336": moved} if headline else {},
                "rare": rare,
            }
        )
    return cases
