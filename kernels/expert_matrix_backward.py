"""Gradients of expert_mlp's matrices: for each expert the sum over its rows of a^T b.

    d_w2[e]  = sum over rows of grad[token]^T (weight * inner[row])
    d_w13[e] = sum over rows of d_gate_up[row]^T x[token]

A row is one of the plan, in its order. grad and x are gathered by token; rows of d_gate_up hold the
gradients of gate and up in turn. 2 * hidden * ffn_dim operations a row for d_w2, twice that for
d_w13; `expert_mlp_backward` has the times.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.expert_tiles import fitting
from mistral_kernels.kernels.matrix_product import tile_place
from mistral_kernels.kernels.processor import processor


@triton.jit
def expert_matrix_backward_kernel(
    a_ptr,  # grad (tokens, hidden), or without OF_W2 d_gate_up (pairs, 2 * columns)
    b_ptr,  # weight * inner (pairs, columns), or without OF_W2 x (tokens, hidden)
    starts_ptr,  # (experts + 1,) i32 of the plan
    order_ptr,  # (pairs,) i32 of the plan
    d_matrix_ptr,  # of d_w2 (experts, hidden, columns) or d_w13 (experts, 2, columns, hidden)
    top_k,  # i32
    size_m,  # i32: hidden, or 2 * columns
    size_n,  # i32: columns, or hidden
    stride_a_row,
    stride_b_row,
    stride_d_matrix_expert,
    stride_d_matrix_row,
    stride_d_matrix_up,  # from a gate row to its up row; unused with OF_W2
    OF_W2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows
    GROUP_M: tl.constexpr,
):
    """Grid (tiles, experts). A tile of an expert's gradient, zeros if the expert has no rows.

    Not persistent: programs take as long as their expert has rows, and the next free
    multiprocessor takes the next one.
    """
    expert = tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(size_m, BLOCK_M), tl.cdiv(size_n, BLOCK_N)
    pid_m, pid_n = tile_place(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < size_m, offs_n < size_n
    end = tl.load(starts_ptr + expert + 1)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.load(starts_ptr + expert), end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        mask_k = row < end
        token = tl.load(order_ptr + row, mask=mask_k, other=0) // top_k
        a_row, b_row = (token, row) if OF_W2 else (row, token)
        a_ptrs = a_ptr + a_row.to(tl.int64)[:, None] * stride_a_row + offs_m[None, :]
        b_ptrs = b_ptr + b_row.to(tl.int64)[:, None] * stride_b_row + offs_n[None, :]
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")

    d_rows = d_matrix_ptr + expert.to(tl.int64) * stride_d_matrix_expert
    if OF_W2:
        d_rows += offs_m.to(tl.int64) * stride_d_matrix_row
    else:
        d_rows += (offs_m // 2).to(tl.int64) * stride_d_matrix_row + offs_m % 2 * stride_d_matrix_up
    total = total.to(d_matrix_ptr.dtype.element_ty)
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(d_rows[:, None] + offs_n[None, :], total, mask=mask)


def tile_config(dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tiles on compute capability `arch`; not measured.

    Row numbers are fetched as far ahead of the rows as those of the products, so n buffers of
    rows take 2n - 1 stages.
    """
    if dtype == torch.float32:  # no tensor cores
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    elif arch[0] in (9, 10):
        tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
    else:
        tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 32}
    stages = 2 * fitting(4, tile, dtype, arch) - 1
    return tile | {"GROUP_M": 8, "num_warps": 8, "num_stages": stages}


def work(pairs: int, experts: int, hidden: int, ffn_dim: int, of_w2: bool) -> tuple[int, int]:
    """Bytes that a call in bf16 with all columns moves, and its operations."""
    size_m, size_n = (hidden, ffn_dim) if of_w2 else (2 * ffn_dim, hidden)
    return 2 * (experts * size_m * size_n + pairs * (size_m + size_n)), 2 * pairs * size_m * size_n


def expert_matrix_backward(
    a: torch.Tensor,
    b: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    d_matrix: torch.Tensor,
    top_k: int,
) -> None:
    """Writes `d_matrix`, all of it: zeros for an expert without rows.

    Args:
        a: grad (tokens, hidden) for d_w2, d_gate_up (pairs, 2 * columns) for d_w13; last dimensions
            are contiguous.
        b: weight * inner (pairs, columns) for d_w2, x (tokens, hidden) for d_w13.
        starts: (experts + 1,), int32, of `expert_plan`.
        order: (pairs,), int32, of `expert_plan`.
        d_matrix: (experts, hidden, columns) of d_w2, or (experts, 2, columns, hidden) of d_w13.
        top_k: slots a token.
    """
    of_w2 = d_matrix.dim() == 3
    arch, _ = processor(a.device)
    config = tile_config(a.dtype, arch)
    tiles = triton.cdiv(a.shape[1], config["BLOCK_M"]) * triton.cdiv(b.shape[1], config["BLOCK_N"])
    expert_matrix_backward_kernel[(tiles, d_matrix.shape[0])](
        a,
        b,
        starts,
        order,
        d_matrix,
        top_k,
        a.shape[1],
        b.shape[1],
        a.stride(0),
        b.stride(0),
        d_matrix.stride(0),
        d_matrix.stride(-2),
        0 if of_w2 else d_matrix.stride(1),
        OF_W2=of_w2,
        **config,
    )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: both matrices."""
    kernel = expert_matrix_backward_kernel
    numbers = [name for name in kernel.arg_names if name.islower()]
    return [
        {
            "case": f"{name} {what}",
            "kernel": kernel,
            "signature": dict.fromkeys(numbers, "i32")
            | dict.fromkeys(("a_ptr", "b_ptr", "d_matrix_ptr"), f"*{name}")
            | dict.fromkeys(("starts_ptr", "order_ptr"), "*i32"),
            "constexprs": {"OF_W2": of_w2, **tile_config(dtype, arch)},
            "due": ("wgmma",) if name == "bf16" else (),
            "work": {f"{what}, 4096 tokens of 8x7B": work(8192, 8, 4096, 14336, of_w2)}
            if name == "bf16"
            else {},
        }
        for dtype, name, of_w2, what in (
            (torch.bfloat16, "bf16", True, "w2"),
            (torch.bfloat16, "bf16", False, "w13"),
            (torch.float32, "fp32", False, "w13"),
        )
    ]
