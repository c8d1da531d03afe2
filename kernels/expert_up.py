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
from mistral_kernels.kernels.low_bit_codes import (
    Codes,
    codegen_arguments,
    format_of,
    low_bit_arguments,
    rows_of_tile,
    weight_bytes,
)
from mistral_kernels.kernels.low_bit_product import low_bit_products
from mistral_kernels.kernels.matrix_product import products
from mistral_kernels.kernels.processor import processor


@triton.jit(do_not_specialize=["tokens"])  # a batch of one must not compile it anew
def expert_up_kernel(
    x_ptr,  # (tokens, hidden), last dimension contiguous
    w13_ptr,  # (experts, 2 * ffn_dim, hidden), gate rows first, last dimension contiguous; or words
    scales_ptr,  # (experts, 2 * ffn_dim, groups); None without FORMAT, as the next two
    zeros_ptr,  # (experts, 2 * ffn_dim, groups) u8 or i8; None: symmetric codes
    perm_ptr,  # (experts, hidden) i32; None: columns are in order
    expert_ids_ptr,  # (tokens, top_k) i32; read with FEW
    starts_ptr,  # (experts + 1,) i32 of the plan; not with FEW
    order_ptr,  # (tokens * top_k,) i32 of the plan; not with FEW
    inner_ptr,  # (rows, ffn_dim), x's dtype: a row a planned row; with FEW (experts, tokens) rows
    tokens,  # i32
    top_k,  # i32
    experts,  # i32
    hidden,  # i32
    ffn_dim,  # i32; of the backward a slice of it
    group_size,  # i32; None without FORMAT
    stride_x_token,
    stride_w13_expert,
    stride_w13_row,
    stride_w13_up,  # from a gate row to its up row
    stride_ids_token,
    FEW: tl.constexpr,
    GATE_UP: tl.constexpr,  # for the backward: inner is gate and up in turn, (rows, 2 * ffn_dim)
    FORMAT: tl.constexpr,  # of low-bit weights; None: w13 has x's dtype
    SPAN: tl.constexpr,  # of low_bit_products
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
        if FORMAT is None:
            gate_up = products(a_rows, mask_m, b_rows, 0, hidden, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            gate_up = low_bit_products(
                a_rows,
                mask_m,
                b_rows,
                scales_ptr,
                zeros_ptr,
                perm_ptr,
                expert,
                (expert.to(tl.int64) * 2 + offs_b % 2) * ffn_dim + column,
                hidden,
                group_size,
                0,
                hidden,
                FORMAT,
                SPAN,
                EVEN_K,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )

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


def tile_config(
    rows: int, dtype: torch.dtype, arch: tuple[int, int], format: str | None = None
) -> dict[str, int]:
    """Tiles for about `rows` rows at a time, on compute capability `arch`; not measured."""
    return tiles_for(rows, dtype, arch, format)


def expert_up(
    x: torch.Tensor,
    w13: torch.Tensor | Codes,
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
        w13: (experts, 2, columns, hidden): gate rows, up rows; a slice of ffn_dim's columns. Or
            all of them in codes, of which the words have four dimensions.
        expert_ids: (tokens, top_k), int32.
        starts, order: of `expert_plan`; None with up to FEW_TOKENS tokens.
        inner: (pairs, columns) by planned row, without a plan (experts * tokens, columns); with
            gate_up (pairs, 2 * columns). x's dtype, contiguous.
        rows: about how many a tile has, for `tile_config`.
        gate_up: gate and up in turn are wanted instead of inner.
    """
    few, (arch, _) = starts is None, processor(x.device)
    config = tile_config(rows_of_tile(rows, w13), x.dtype, arch, format_of(w13))
    (w13, *low), flags = low_bit_arguments(w13, config["BLOCK_K"])
    (tokens, hidden), (experts, _, columns, _), top_k = x.shape, w13.shape, expert_ids.shape[1]
    column_tiles = triton.cdiv(columns, config["BLOCK_N"] // 2)
    grid = (column_tiles, min(experts, tokens * top_k)) if few else (programs(x, config),)
    expert_up_kernel[grid](
        x,
        w13,
        *low[:3],
        expert_ids,
        starts,
        order,
        inner,
        tokens,
        top_k,
        experts,
        hidden,
        columns,
        *low[3:],
        x.stride(0),
        w13.stride(0),
        w13.stride(2),
        w13.stride(1),
        expert_ids.stride(0),
        FEW=few,
        GATE_UP=gate_up,
        **flags,
        EVEN_K=hidden % config["BLOCK_K"] == 0,
        PAIRS=triton.next_power_of_2(FEW_TOKENS * top_k) if few else 1,
        EXPERTS=1 if few else triton.next_power_of_2(experts),
        **config,
    )


def work(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    ffn_dim: int,
    itemsize: int,
    weight_itemsize: float | None = None,
) -> tuple[int, int]:
    """Bytes that a call moves, without gate_up, and its operations; weights may be smaller."""
    weights = 2 * used_experts(tokens, top_k, experts) * hidden * ffn_dim
    rows = tokens * hidden + result_rows(tokens, top_k, experts) * ffn_dim
    return round(
        weights * (weight_itemsize or itemsize) + rows * itemsize
    ), 4 * tokens * top_k * hidden * ffn_dim


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8x7B, each path and tile."""
    bf16, fp32, plain, cases = torch.bfloat16, torch.float32, (None, 4096), []
    numbers = [argument for argument in expert_up_kernel.arg_names if argument.islower()]
    for tokens, rows, gate_up, dtype, (format, group_size), rare in (
        (8, 8, False, bf16, ("int4", 32), True),
        (64, 32, False, bf16, ("int8", 32), True),
        (4096, 128, False, fp32, ("int4", 128), True),
        (128, 64, False, bf16, ("fp8", 4096), True),
        (1, 1, False, bf16, ("int8", 4096), True),
        (1, 1, False, bf16, ("int4", 128), False),
        (4096, 128, False, bf16, ("int4", 128), False),
        (1, 1, False, bf16, plain, False),
        (32, 32, False, bf16, plain, False),
        (128, 64, False, bf16, plain, False),
        (4096, 128, False, bf16, plain, False),
        (4096, 128, True, bf16, plain, False),
        (4096, 128, False, fp32, plain, False),
    ):
        few, config = tokens <= FEW_TOKENS, tile_config(rows, dtype, arch, format)
        low = codegen_arguments(format, group_size, 4096, config["BLOCK_K"], group_size == 32)
        name, plan = "bf16" if dtype == bf16 else "fp32", "constexpr" if few else "*i32"
        types = {"expert_ids_ptr": "*i32", "starts_ptr": plan, "order_ptr": plan}
        types |= dict.fromkeys(("x_ptr", "w13_ptr", "inner_ptr"), f"*{name}") | low[0]
        if format is not None:
            types["w13_ptr"] = "*i32"
        flags = {"FEW": few, "GATE_UP": gate_up, "EVEN_K": True, **low[1]}
        size = weight_bytes(format, group_size) if format else None
        moved = work(tokens, 2, 8, 4096, 14336, dtype.itemsize, size)
        what = f"{name} {tokens}" + (f" {format} in {group_size}" if format else "")
        headline = name == "bf16" and not gate_up and group_size != 32
        cases.append(
            {
                "case": what + (" gate_up" if gate_up else ""),
                "kernel": expert_up_kernel,
                "signature": dict.fromkeys(numbers, "i32") | types,
                "constexprs": {**config, **flags, "PAIRS": 64 if few else 1, "EXPERTS": 8},
                "due": ("wgmma" if config["BLOCK_M"] >= 64 else "mma",) if name == "bf16" else (),
                "work": {f"{tokens} tokens of 8x7B{f', {format}' if format else ''}": moved}
                if headline
                else {},
                "rare": rare,
            }
        )
    return cases
