"""Gradients of expert_mlp's rows: each row times its expert's matrix.

    d_inner[row] = w2[e]^T grad[token]
    slot[row]    = w13[e]^T d_gate_up[row]        d_x[token] is the sum of the token's slots

A row is one of the plan. grad is gathered by token; rows of d_gate_up hold the gradients of gate
and up in turn, so rows of w1 and w3 are taken in turn. 2 * hidden * ffn_dim operations a row for
d_inner, twice that for slots; `expert_mlp_backward` has the times.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.expert_tiles import (
    fitting,
    planned_tile,
    planned_tiles,
    programs,
    tiles_for,
)
from mistral_kernels.kernels.matrix_product import add_products
from mistral_kernels.kernels.processor import processor


@triton.jit
def expert_rows_backward_kernel(
    a_ptr,  # grad (tokens, hidden) with OF_W2, or d_gate_up (pairs, 2 * columns)
    b_ptr,  # a slice of w2 (experts, hidden, columns) or w13 (experts, 2, columns, hidden)
    starts_ptr,  # (experts + 1,) i32 of the plan
    order_ptr,  # (pairs,) i32 of the plan
    out_ptr,  # d_inner (pairs, columns) or d_x's slots (pairs, hidden), fp32
    top_k,  # i32
    experts,  # i32
    size_k,  # i32: hidden, or 2 * columns
    size_n,  # i32: columns, or hidden
    stride_a_row,
    stride_b_expert,
    stride_b_row,
    stride_b_up,  # from a gate row to its up row; unused with OF_W2
    OF_W2: tl.constexpr,
    ADD: tl.constexpr,  # out holds the sum over earlier columns
    EVEN: tl.constexpr,  # BLOCK_K divides size_k and BLOCK_N size_n
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (programs,). Tiles of an expert's rows, times its matrix."""
    tiles_n = tl.cdiv(size_n, BLOCK_N)
    tiles = planned_tiles(starts_ptr, experts, tiles_n, BLOCK_M, EXPERTS)
    offs_k = tl.arange(0, BLOCK_K)
    if OF_W2:
        b_rows, step = offs_k * stride_b_row, BLOCK_K
    else:
        b_rows, step = offs_k // 2 * stride_b_row + offs_k % 2 * stride_b_up, BLOCK_K // 2
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, row, mask_m, pid_n = planned_tile(
            tile, starts_ptr, experts, tiles_n, BLOCK_M, GROUP_M, EXPERTS
        )
        a_row = tl.load(order_ptr + row) // top_k if OF_W2 else row
        a_tile = a_ptr + (a_row.to(tl.int64) * stride_a_row)[:, None] + offs_k[None, :]
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < size_n
        b_tile = b_ptr + expert.to(tl.int64) * stride_b_expert
        b_tile += b_rows[:, None] + offs_n[None, :]
        out_rows = out_ptr + row.to(tl.int64) * size_n
        mask = mask_m[:, None] & mask_n[None, :]
        if ADD:
            total = tl.load(out_rows[:, None] + offs_n[None, :], mask=mask, other=0.0)
        else:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b_step = step * stride_b_row
        total = add_products(
            total, a_tile, mask_m, b_tile, b_step, mask_n, 0, size_k, EVEN, BLOCK_K
        )
        tl.store(out_rows[:, None] + offs_n[None, :], total, mask=mask)


def tile_config(rows: int, add: bool, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tiles for about `rows` rows at a time, as the forward's; not measured.

    128 x 256 sums would spill with mma, and where they go on from earlier ones: half of that then,
    a quarter on sm_100.
    """
    config = tiles_for(rows, dtype, arch)
    if add or arch[0] not in (9, 10):
        config["BLOCK_N"] = min(config["BLOCK_N"], 64 if add and arch[0] == 10 else 128)
        config["num_stages"] = fitting(4, config, dtype, arch)
    return config


def work(pairs: int, experts: int, hidden: int, ffn_dim: int, of_w2: bool) -> tuple[int, int]:
    """Bytes that a call in bf16 with all columns moves, if all experts are used; operations."""
    size_k, size_n = (hidden, ffn_dim) if of_w2 else (2 * ffn_dim, hidden)
    moved = 2 * (experts * size_k + pairs) * size_n + 2 * pairs * (size_k + size_n)
    return moved, 2 * pairs * size_k * size_n


def expert_rows_backward(
    a: torch.Tensor,
    b: torch.Tensor,
    starts: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
    top_k: int,
    rows: int,
    add: bool,
) -> None:
    """Writes `out`, or with `add` adds to it.

    Args:
        a: grad (tokens, hidden) for d_inner, d_gate_up (pairs, 2 * columns) for slots; last
            dimensions are contiguous.
        b: (experts, hidden, columns) of w2, or (experts, 2, columns, hidden) of w13.
        starts: (experts + 1,), int32, of `expert_plan`.
        order: (pairs,), int32, of `expert_plan`.
        out: d_inner (pairs, columns) or slots (pairs, hidden), float32, contiguous.
        top_k: slots a token.
        rows: about how many an expert has, for `tile_config`.
        add: the sum over columns goes on from what `out` holds.
    """
    (_, size_k), (_, size_n), experts = a.shape, out.shape, len(b)
    arch, _ = processor(a.device)
    config = tile_config(rows, add, a.dtype, arch)
    even = size_k % config["BLOCK_K"] == 0 and size_n % config["BLOCK_N"] == 0
    expert_rows_backward_kernel[(programs(a, config),)](
        a,
        b,
        starts,
        order,
        out,
        top_k,
        experts,
        size_k,
        size_n,
        a.stride(0),
        b.stride(0),
        b.stride(-2),
        b.stride(1),
        OF_W2=b.dim() == 3,
        ADD=add,
        EVEN=even,
        EXPERTS=triton.next_power_of_2(experts),
        **config,
    )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8x7B, both products, each tile."""
    kernel = expert_rows_backward_kernel
    numbers = [name for name in kernel.arg_names if name.islower()]
    cases = []
    for rows, dtype, name, products in (
        (16, torch.bfloat16, "bf16", ((True, False), (False, True))),
        (64, torch.bfloat16, "bf16", ((True, False), (False, True))),
        (128, torch.bfloat16, "bf16", ((True, False), (False, False), (False, True))),
        (128, torch.float32, "fp32", ((True, False), (False, True))),
    ):
        due = "wgmma" if rows >= 64 else "mma"
        for of_w2, add in products:
            config = tile_config(rows, add, dtype, arch)
            flags = {"OF_W2": of_w2, "ADD": add, "EVEN": True, "EXPERTS": 8}
            types = dict.fromkeys(("a_ptr", "b_ptr"), f"*{name}")
            types |= dict.fromkeys(("starts_ptr", "order_ptr"), "*i32")
            types["out_ptr"] = "*fp32"
            what = "d_inner" if of_w2 else "slots, added" if add else "slots"
            cases.append(
                {
                    "case": f"{name} {rows} {what}",
                    "kernel": kernel,
                    "signature": dict.fromkeys(numbers, "i32") | types,
                    "constexprs": {**config, **flags},
                    "due": (due,) if name == "bf16" else (),
                    "work": {f"{what}, 4096 tokens of 8x7B": work(8192, 8, 4096, 14336, of_w2)}
                    if name == "bf16" and rows == 128 and not add
                    else {},
                }
            )
    return cases
