"""The second of expert_mlp's grouped GEMMs: slots = w2[e] inner for rows of expert e.

2 * hidden * ffn_dim operations a row: a third of the forward, whose times `expert_mlp` has.
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

BUSY_PROGRAMS = 512  # four for each of 132 multiprocessors


@triton.jit(do_not_specialize=["tokens"])  # a batch of one must not compile it anew
def expert_down_kernel(
    inner_ptr,  # of expert_up_kernel
    w2_ptr,  # (experts, hidden, ffn_dim), last dimension contiguous; or words
    scales_ptr,  # (experts, hidden, groups); None without FORMAT, as the next two
    zeros_ptr,  # (experts, hidden, groups) u8 or i8; None: symmetric codes
    perm_ptr,  # (experts, ffn_dim) i32; None: columns are in order
    expert_ids_ptr,  # (tokens, top_k) i32; read with FEW
    starts_ptr,  # (experts + 1,) i32 of the plan; not with FEW
    slots_ptr,  # (rows, hidden) fp32: a row a planned row; with FEW (splits, experts, tokens) rows
    tokens,  # i32
    top_k,  # i32
    experts,  # i32
    hidden,  # i32
    ffn_dim,  # i32
    group_size,  # i32; None without FORMAT
    k_split,  # i32: how much of ffn_dim a program sums, a multiple of BLOCK_K; all without FEW
    stride_w2_expert,
    stride_w2_row,
    stride_ids_token,
    FEW: tl.constexpr,
    FORMAT: tl.constexpr,  # of low-bit weights; None: w2 has inner's dtype
    SPAN: tl.constexpr,  # of low_bit_products
    EVEN_K: tl.constexpr,  # BLOCK_K divides ffn_dim
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (programs,), with FEW (column tiles, experts or pairs, splits)."""
    tiles_n = tl.cdiv(hidden, BLOCK_N)
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
    begin = tl.program_id(2) * k_split
    end = tl.minimum(begin + k_split, ffn_dim)
    for tile in range(first, tiles, tl.num_programs(0)):
        expert, row, mask_m, pid_n = tile_rows(
            tile, own, starts_ptr, tokens, experts, tiles_n, FEW, EXPERTS, BLOCK_M, GROUP_M
        )
        a_rows = inner_ptr + row.to(tl.int64) * ffn_dim
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < hidden
        b_rows = w2_ptr + expert.to(tl.int64) * stride_w2_expert
        column = tl.minimum(offs_n, hidden - 1).to(tl.int64)
        b_rows += column * stride_w2_row
        if FORMAT is None:
            total = products(a_rows, mask_m, b_rows, begin, end, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            total = low_bit_products(
                a_rows,
                mask_m,
                b_rows,
                scales_ptr,
                zeros_ptr,
                perm_ptr,
                expert,
                expert.to(tl.int64) * hidden + column,
                ffn_dim,
                group_size,
                begin,
                end,
                FORMAT,
                SPAN,
                EVEN_K,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )

        row += tl.program_id(2) * experts * tokens  # only FEW has splits
        slot_ptrs = slots_ptr + row.to(tl.int64)[:, None] * hidden + offs_n[None, :]
        tl.store(slot_ptrs, total, mask=mask_m[:, None] & mask_n[None, :])


def tile_config(
    rows: int, dtype: torch.dtype, arch: tuple[int, int], format: str | None = None
) -> dict[str, int]:
    """Tiles for about `rows` rows at a time, on compute capability `arch`; not measured."""
    return tiles_for(rows, dtype, arch, format)


def split_config(
    tokens: int, top_k: int, experts: int, hidden: int, ffn_dim: int, config: dict[str, int]
) -> int:
    """How much of ffn_dim a program of the down projection sums with few tokens; not measured.

    Cut until BUSY_PROGRAMS read at a time, but into pieces of four stages at least and eight pieces
    at most, which the combine adds in order.
    """
    tiles = min(experts, tokens * top_k) * triton.cdiv(hidden, config["BLOCK_N"])
    stages = triton.cdiv(ffn_dim, config["BLOCK_K"])
    splits = min(triton.cdiv(BUSY_PROGRAMS, tiles), 8, max(stages // 4, 1))
    return triton.cdiv(stages, splits) * config["BLOCK_K"]


def work(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    ffn_dim: int,
    splits: int,
    itemsize: int,
    weight_itemsize: float | None = None,
) -> tuple[int, int]:
    """Bytes that a call moves, and its operations; weights may be smaller than inner."""
    weights = used_experts(tokens, top_k, experts) * hidden * ffn_dim
    weights *= weight_itemsize or itemsize
    rows = result_rows(tokens, top_k, experts) * (ffn_dim * itemsize + 4 * splits * hidden)
    return round(weights + rows), 2 * tokens * top_k * hidden * ffn_dim


def expert_down(
    inner: torch.Tensor,
    w2: torch.Tensor | Codes,
    expert_ids: torch.Tensor,
    starts: torch.Tensor | None,
    rows: int,
) -> tuple[torch.Tensor, int]:
    """What w2 makes of `inner`.

    Args:
        inner: of `expert_up`.
        w2: (experts, hidden, ffn_dim), inner's dtype, last dimension contiguous; or codes.
        expert_ids: (tokens, top_k), int32, last dimension contiguous.
        starts: of `expert_plan`; None with up to FEW_TOKENS tokens.
        rows: about how many a tile has, for `tile_config`.

    Returns:
        slots: (splits * rows of inner, hidden), float32.
        splits: into how many parts each sum is cut.
    """
    (tokens, top_k), few, (arch, _) = expert_ids.shape, starts is None, processor(inner.device)
    config = tile_config(rows_of_tile(rows, w2), inner.dtype, arch, format_of(w2))
    (w2, *low), flags = low_bit_arguments(w2, config["BLOCK_K"])
    (experts, hidden, _), ffn_dim = w2.shape, inner.shape[1]
    k_split = ffn_dim
    if few:
        k_split = split_config(tokens, top_k, experts, hidden, ffn_dim, config)
    splits = triton.cdiv(ffn_dim, k_split)
    slots = inner.new_empty(splits * len(inner), hidden, dtype=torch.float32)
    column_tiles = triton.cdiv(hidden, config["BLOCK_N"])
    used = min(experts, tokens * top_k)
    grid = (column_tiles, used, splits) if few else (programs(inner, config),)
    expert_down_kernel[grid](
        inner,
        w2,
        *low[:3],
        expert_ids,
        starts,
        slots,
        tokens,
        top_k,
        experts,
        hidden,
        ffn_dim,
        *low[3:],
        k_split,
        w2.stride(0),
        w2.stride(1),
        expert_ids.stride(0),
        FEW=few,
        **flags,
        EVEN_K=ffn_dim % config["BLOCK_K"] == 0,
        PAIRS=triton.next_power_of_2(FEW_TOKENS * top_k) if few else 1,
        EXPERTS=1 if few else triton.next_power_of_2(experts),
        **config,
    )
    return slots, splits


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8x7B, each path and tile."""
    bf16, fp32, plain, cases = torch.bfloat16, torch.float32, (None, 14336), []
    numbers = [argument for argument in expert_down_kernel.arg_names if argument.islower()]
    for tokens, rows, dtype, (format, group_size), rare in (
        (8, 8, bf16, ("int4", 32), True),
        (64, 32, bf16, ("int8", 32), True),
        (4096, 128, fp32, ("int4", 128), True),
        (128, 64, bf16, ("fp8", 14336), True),
        (1, 1, bf16, ("int8", 14336), True),
        (1, 1, bf16, ("int4", 128), False),
        (4096, 128, bf16, ("int4", 128), False),
        (1, 1, bf16, plain, False),
        (32, 32, bf16, plain, False),
        (128, 64, bf16, plain, False),
        (4096, 128, bf16, plain, False),
        (4096, 128, fp32, plain, False),
    ):
        few, config = tokens <= FEW_TOKENS, tile_config(rows, dtype, arch, format)
        low = codegen_arguments(format, group_size, 14336, config["BLOCK_K"], group_size == 32)
        k_split = split_config(tokens, 2, 8, 4096, 14336, config) if few else 14336
        splits, name = triton.cdiv(14336, k_split), "bf16" if dtype == bf16 else "fp32"
        size = weight_bytes(format, group_size) if format else None
        moved = work(tokens, 2, 8, 4096, 14336, splits, dtype.itemsize, size)
        types = {"expert_ids_ptr": "*i32", "starts_ptr": "constexpr" if few else "*i32"}
        types |= {"inner_ptr": f"*{name}", "w2_ptr": f"*{name}", "slots_ptr": "*fp32"} | low[0]
        if format is not None:
            types["w2_ptr"] = "*i32"
        flags = {"FEW": few, "EVEN_K": True, "PAIRS": 64 if few else 1, "EXPERTS": 8, **low[1]}
        headline = name == "bf16" and group_size != 32
        cases.append(
            {
                "case": f"{name} {tokens}" + (f" {format} in {group_size}" if format else ""),
                "kernel": expert_down_kernel,
                "signature": dict.fromkeys(numbers, "i32") | types,
                "constexprs": {**config, **flags},
                "due": ("wgmma" if config["BLOCK_M"] >= 64 else "mma",) if name == "bf16" else (),
                "work": {f"{tokens} tokens of 8x7B{f', {format}' if format else ''}": moved}
                if headline
                else {},
                "rare": rare,
            }
        )
    return cases
