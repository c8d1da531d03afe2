"""Adds partial sums: total[column] = sum over parts, always in the same order.

Reads 4 * parts * columns bytes, most of them from L2, where they were just written.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(
    partial_ptr,  # (parts, columns) fp32, contiguous
    total_ptr,  # (columns,)
    parts,  # i32
    columns,  # i32
    BLOCK_PARTS: tl.constexpr,  # power of two
    BLOCK_COLUMNS: tl.constexpr,  # power of two
):
    """Grid (cdiv(columns, BLOCK_COLUMNS),). A program sums its columns."""
    offs = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        offs_part = first + tl.arange(0, BLOCK_PARTS)
        mask = (offs_part < parts)[:, None] & (offs < columns)[None, :]
        tile = partial_ptr + offs_part[:, None] * columns + offs[None, :]
        total += tl.sum(tl.load(tile, mask=mask, other=0.0), axis=0)
    tl.store(total_ptr + offs, total.to(total_ptr.dtype.element_ty), mask=offs < columns)


# 16 values of 64 parts a thread; 32 columns are a line of 128 bytes, and 4096 columns make 128
# programs. Not measured.
CONFIG = {"BLOCK_PARTS": 64, "BLOCK_COLUMNS": 32, "num_warps": 4}


def work(parts: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a call moves, and its operations."""
    return (4 * parts + dtype.itemsize) * columns, parts * columns


def sum_parts(partial: torch.Tensor, total: torch.Tensor) -> None:
    """Writes `total`.

    Args:
        partial: (parts, columns), float32, contiguous.
        total: (columns,), any float dtype, contiguous.
    """
    parts, columns = partial.shape
    grid = (triton.cdiv(columns, CONFIG["BLOCK_COLUMNS"]),)
    sum_parts_kernel[grid](partial, total, parts, columns, **CONFIG)


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: the gradient of a norm's weight."""
    pointers = {"partial_ptr": "*fp32", "total_ptr": "*bf16"}
    return [
        {
            "case": "fp32 to bf16",
            "kernel": sum_parts_kernel,
            "signature": pointers | {"parts": "i32", "columns": "i32"},
            "constexprs": CONFIG,
            "due": ("load_16",),
            "work": {"256 parts of 4096": work(256, 4096, torch.bfloat16)},
        }
    ]
