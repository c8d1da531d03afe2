"""The first of expert_mlp's grouped GEMMs: inner = silu(w1[e] x) * w3[e] x for rows of expert e.

The gather of x lies in the loads, SwiGLU at the end; the backward asks for gate = w1[e] x and
up = w3[e] x instead. 4 * hidden * ffn_dim operations a row: two thirds of the forward, whose times
`expert_mlp` has.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.expert_tiles import (
    FEW_TOKENS,
    programs,
    result_rows,
    tile_rows,
    tiles_for,
    tiles_of_program,
    used_experts,
)
from mistral_kernels.kernels.matrix_product import products
from mistral_kernels.kernels.processor import processor


@triton.jit(do_not_specialize=["tokens"])  # a batch of one must not compile it anew
def expert_up_kernel(
    x_ptr,  # (tokens, hidden), last dimension contiguous
    w13_ptr,  # (experts, 2 * ffn_dim, hidden), gate rows first, last dimension contiguous
    expert_ids_ptr,  # (tokens, top_k) i32; read with FEW
    starts_ptr,  # (experts + 1,) i32 of the plan; not with FEW
    order_ptr,  # (tokens * top_k,) i32 of the plan; not with FEW
    inner_ptr,  # (rows, ffn_dim), x's dtype: a row a planned row; with FEW (experts, tokens) rows
    tokens,  # i32
    top_k,  # i32
    experts,  # i32
    hidden,  # i32
    ffn_dim,  # i32; of the backward a slice of it
    stride_x_token,
    stride_w13_expert,
    stride_w13_row,
    stride_w13_up,  # from a gate row to its up row
    stride_ids_token,
    FEW: tl.constexpr,
    GATE_UP: tl.constexpr,  # for the backward: inner is gate and up in turn, (rows, 2 * ffn_dim)
    EVEN_K: tl.constexpr,  # BLOCK_K divides hidden
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of w13: half of them gate, half up
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (programs,), with FEW (column tiles, experts or pairs, 1). Tiles of an expert's rows."""
    half: tl.constexpr = BLOCK_N // 2
    tiles_n = tl.cdiv(ffn_dim, half)
    first, tiles, own = tiles_of_program(
        expert_ids_ptr,
        starts_ptr,
        tokens,
        top_k,
        experts,
        tiles_n,
        stride_ids_token,
        FEW,
        PAIRS,
        EXPERTS,
        BLOCK_M,
    )
    offs_b = tl.arange(0, BLOCK_N)
    for tile in range(first, tiles, tl.num_programs(0)):
        expert, row, mask_m, pid_n = tile_rows(
            tile, own, starts_ptr, tokens, experts, tiles_n, FEW, EXPERTS, BLOCK_M, GROUP_M
        )
        if FEW:
            token = row - expert * tokens
        else:
            token = tl.load(order_ptr + row) // top_k
        a_rows = x_ptr + token.to(tl.int64) * stride_x_token

        # Gate and up rows take turns, so the two factors of an output lie side by side in a thread.
        column = tl.minimum(pid_n * half + offs_b // 2, ffn_dim - 1).to(tl.int64)
        b_rows = w13_ptr + expert.to(tl.int64) * stride_w13_expert
        b_rows += column * stride_w13_row + offs_b % 2 * stride_w13_up
        gate_up = products(a_rows, mask_m, b_rows, 0, hidden, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)

        if GATE_UP:
            result, columns = gate_up, 2 * ffn_dim
            offs_n = pid_n * BLOCK_N + offs_b
        else:
            gate, up = tl.split(tl.reshape(gate_up, (BLOCK_M, half, 2)))
            result, columns = gate * tl.sigmoid(gate) * up, ffn_dim
            offs_n = pid_n * half + tl.arange(0, half)
        inner_ptrs = inner_ptr + row.to(tl.int64)[:, None] * columns + offs_n[None, :]
        mask = mask_m[:, None] & (offs_n < columns)[None, :]
        tl.store(inner_ptrs, result.to(inner_ptr.dtype.element_ty), mask=mask)


def tile_config(rows: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tiles for about `rows` rows at a time, on compute capability `arch`; not measured."""
    return tiles_for(rows, dtype, arch)


def expert_up(
    x: torch.Tensor,
    w13: torch.Tensor,
    expert_ids: torch.Tensor,
    starts: torch.Tensor | None,
    order: torch.Tensor | None,
    inner: torch.Tensor,
    rows: int,
    gate_up: bool,
) -> None:
    """Writes `inner`.

    Args:
        x: (tokens, hidden), any float dtype; all inputs have a contiguous last dimension.
        w13: (experts, 2, columns, hidden): gate rows, up rows; a slice of ffn_dim's columns.
        expert_ids: (tokens, top_k), int32.
        starts, order: of `expert_plan`; None with up to FEW_TOKENS tokens.
        inner: (pairs, columns) by planned row, without a plan (experts * tokens, columns); with
            gate_up (pairs, 2 * columns). x's dtype, contiguous.
        rows: about how many a tile has, for `tile_config`.
        gate_up: gate and up in turn are wanted instead of inner.
    """
    (tokens, hidden), (experts, _, columns, _), top_k = x.shape, w13.shape, expert_ids.shape[1]
    few, (arch, _) = starts is None, processor(x.device)
    config = tile_config(rows, x.dtype, arch)
    column_tiles = triton.cdiv(columns, config["BLOCK_N"] // 2)
    grid = (column_tiles, min(experts, tokens * top_k)) if few else (programs(x, config),)
    expert_up_kernel[grid](
        x,
        w13,
        expert_ids,
        starts,
        order,
        inner,
        tokens,
        top_k,
        experts,
        hidden,
        columns,
        x.stride(0),
        w13.stride(0),
        w13.stride(2),
        w13.stride(1),
        expert_ids.stride(0),
        FEW=few,
        GATE_UP=gate_up,
        EVEN_K=hidden % config["BLOCK_K"] == 0,
        PAIRS=triton.next_power_of_2(FEW_TOKENS * top_k) if few else 1,
        EXPERTS=1 if few else triton.next_power_of_2(experts),
        **config,
    )


def work(
    tokens: int, top_k: int, experts: int, hidden: int, ffn_dim: int, itemsize: int
) -> tuple[int, int]:
    """Bytes that a call moves, without gate_up, and its operations."""
    weights = 2 * used_experts(tokens, top_k, experts) * hidden * ffn_dim
    rows = tokens * hidden + result_rows(tokens, top_k, experts) * ffn_dim
    return round((weights + rows) * itemsize), 4 * tokens * top_k * hidden * ffn_dim


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8x7B, each path and tile."""
    cases = []
    for tokens, rows, gate_up, dtype, name in (
        (1, 1, False, torch.bfloat16, "bf16"),
        (32, 32, False, torch.bfloat16, "bf16"),
        (128, 64, False, torch.bfloat16, "bf16"),
        (4096, 128, False, torch.bfloat16, "bf16"),
        (4096, 128, True, torch.bfloat16, "bf16"),
        (4096, 128, False, torch.float32, "fp32"),
    ):
        few, config = tokens <= FEW_TOKENS, tile_config(rows, dtype, arch)
        plan = "constexpr" if few else "*i32"
        types = {"expert_ids_ptr": "*i32", "starts_ptr": plan, "order_ptr": plan}
        types |= dict.fromkeys(("x_ptr", "w13_ptr", "inner_ptr"), f"*{name}")
        numbers = [argument for argument in expert_up_kernel.arg_names if argument.islower()]
        flags = {"FEW": few, "GATE_UP": gate_up, "EVEN_K": True}
        moved = work(tokens, 2, 8, 4096, 14336, dtype.itemsize)
        headline = name == "bf16" and not gate_up
        cases.append(
            {
                "case": f"{name} {tokens}{' gate_up' if gate_up else ''}",
                "kernel": expert_up_kernel,
                "signature": dict.fromkeys(numbers, "i32") | types,
                "constexprs": {**config, **flags, "PAIRS": 64 if few else 1, "EXPERTS": 8},
                "due": ("wgmma" if rows >= 64 else "mma",) if name == "bf16" else (),
                "work": {f"{tokens} tokens of 8x7B": moved} if headline else {},
            }
        )
    return cases
