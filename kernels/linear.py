"""linear in Triton: out[row, o] = sum over i, in order, of x[row, i] * weight[o, i].

A call reads in * out * itemsize bytes of weights, x and out beside them, and does 2 * rows * in *
out operations. Mistral 7B's gate and up projection (28672 x 4096, bf16, 235 MB) at the data sheets'
2.0, 3.35, 4.8 TB/s and 312, 989, 989 TFLOP/s of A100, H100, H200 (not measured):

    rows      TFLOP    A100       H100       H200
        1    0.0002    0.12 ms    0.07 ms    0.05 ms    memory
        8    0.0019    0.12       0.07       0.05       memory
    4,096    0.96      3.1        0.97       0.97       matrix units

The sum over `in` is never cut, so it has one order, and nothing is left to reduce.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.matrix_product import products, tile_place
from mistral_kernels.kernels.processor import processor, shared_bytes


@triton.jit(do_not_specialize=["rows"])  # a batch of one must not compile it anew
def linear_kernel(
    x_ptr,  # (rows, in_dim), last dimension contiguous
    weight_ptr,  # (out_dim, in_dim), last dimension contiguous
    out_ptr,  # (rows, out_dim), contiguous
    rows,  # i32
    in_dim,  # i32
    out_dim,  # i32
    stride_x_row,
    stride_weight_row,
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
    x_rows = x_ptr + row * stride_x_row
    # Columns behind the last are the last once more, so that their loads need no mask.
    column = tl.minimum(offs_n, out_dim - 1).to(tl.int64)
    weight_rows = weight_ptr + column * stride_weight_row
    total = products(x_rows, mask_m, weight_rows, 0, in_dim, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)

    out_ptrs = out_ptr + row[:, None] * out_dim + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < out_dim)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def tile_config(
    rows: int, dtype: torch.dtype, arch: tuple[int, int], batch_invariant: bool
) -> dict[str, int]:
    """Tiles of `rows` rows on compute capability `arch`; not measured.

    Up to 16 rows: 32 weight rows a program and 256 bytes of each a stage. 4096 of them make 128
    programs with 40 KB of weights on their way each, 5 MB in all; an H200 asks for 4 (4.8 TB/s
    times 0.8 us). Up to 64 rows: tiles of 64 x 64. Two programs of either fit on a multiprocessor.
    More rows: 128 x 256, the widest tile whose sums fit into registers.
    batch_invariant: 64 x 64 for any number of rows. 64 rows are the least that wgmma takes; with
    more columns, a decode step would have too few programs for its bandwidth (4096 weight rows
    make 64 programs, 2.6 MB on their way).
    """
    if batch_invariant:
        block_m = 64
    else:
        block_m = 16 if rows <= 16 else 64 if rows <= 64 else 128
    if dtype == torch.float32:  # no tensor cores: the sums of a thread are what limits
        block_m = min(block_m, 64)
        block_n, block_k, num_warps = 32 if block_m == 16 else 64, 32, 4
    elif block_m == 16:
        block_n, block_k, num_warps = 32, 128, 4
    elif block_m == 64:
        block_n, block_k, num_warps = 64, 64, 4
    else:
        # mma keeps its operands in registers, too: with 64 it would spill.
        block_n, block_k, num_warps = 256, 64 if arch[0] in (9, 10) else 32, 8
    shared = shared_bytes(arch) // (1 if block_n == 256 else 2)
    stage_bytes = (block_m + block_n) * block_k * dtype.itemsize
    # Longer pipelines of 64 x 64 spill on sm_120.
    most_stages = 2 if arch[0] == 12 and block_m == block_n == 64 else 6
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "num_warps": num_warps,
        "num_stages": min(most_stages, shared // stage_bytes),
    }


def work(rows: int, in_dim: int, out_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a call moves, and its operations."""
    elements = in_dim * out_dim + rows * (in_dim + out_dim)
    return elements * dtype.itemsize, 2 * rows * in_dim * out_dim


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, batch_invariant: bool) -> None:
    """Writes `out`.

    Args:
        x: (rows, in), any float dtype, last dimension contiguous.
        weight: (out, in), x's dtype, last dimension contiguous.
        out: (rows, out), x's dtype, contiguous; rows may be several dimensions.
        batch_invariant: the same tiles for any number of rows.
    """
    (rows, in_dim), out_dim = x.shape, weight.shape[0]
    if out.numel() == 0:
        return
    arch, _ = processor(x.device)
    config = tile_config(rows, x.dtype, arch, batch_invariant)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(out_dim, config["BLOCK_N"])
    with torch.cuda.device_of(x):  # Triton launches on the current device
        linear_kernel[(tiles,)](
            x,
            weight,
            out,
            rows,
            in_dim,
            out_dim,
            x.stride(0),
            weight.stride(0),
            EVEN_K=in_dim % config["BLOCK_K"] == 0,
            **config,
        )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: each tile, `in` a multiple of BLOCK_K."""
    cases = []
    for rows, dtype, name, batch_invariant in (
        (8, torch.bfloat16, "bf16", False),
        (64, torch.bfloat16, "bf16", False),
        (4096, torch.bfloat16, "bf16", False),
        (8, torch.float32, "fp32", False),
        (4096, torch.float32, "fp32", False),
    ):
        config = tile_config(rows, dtype, arch, batch_invariant)
        due = "wgmma" if config["BLOCK_M"] >= 64 else "mma"
        numbers = ("rows", "in_dim", "out_dim", "stride_x_row", "stride_weight_row")
        signature = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), f"*{name}")
        cases.append(
            {
                "case": f"{name} {rows}",
                "kernel": linear_kernel,
                "signature": signature | dict.fromkeys(numbers, "i32"),
                "constexprs": {**config, "EVEN_K": True},
                "due": (due, "cp_async") if name == "bf16" else ("cp_async",),
                "work": {f"{rows} rows, 4096 to 28672": work(rows, 4096, 28672, dtype)}
                if name == "bf16"
                else {},
            }
        )
    return cases
