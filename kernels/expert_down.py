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
from mistral_kernels.kernels.matrix_product import products
from mistral_kernels.kernels.processor import processor

BUSY_PROGRAMS = 512  # four for each of 132 multiprocessors


@triton.jit(do_not_specialize=["tokens"])  # a batch of one must not compile it anew
def expert_down_kernel(
    inner_ptr,  # of expert_up_kernel
    w2_ptr,  # (experts, hidden, ffn_dim), last dimension contiguous
    expert_ids_ptr,  # (tokens, top_k) i32; read with FEW
    starts_ptr,  # (experts + 1,) i32 of the plan; not with FEW
    slots_ptr,  # (rows, hidden) fp32: a row a planned row; with FEW (splits, experts, tokens) rows
    tokens,  # i32
    top_k,  # i32
    experts,  # i32
    hidden,  # i32
    ffn_dim,  # i32
    k_split,  # i32: how much of ffn_dim a program sums, a multiple of BLOCK_K; all without FEW
    stride_w2_expert,
    stride_w2_row,
    stride_ids_token,
    FEW: tl.constexpr,
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
        b_rows += tl.minimum(offs_n, hidden - 1).to(tl.int64) * stride_w2_row
        total = products(a_rows, mask_m, b_rows, begin, end, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)

        row += tl.program_id(2) * experts * tokens  # only FEW has splits
        slot_ptrs = slots_ptr + row.to(tl.int64)[:, None] * hidden + offs_n[None, :]
        tl.store(slot_ptrs, total, mask=mask_m[:, None] & mask_n[None, :])


def tile_config(rows: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tiles for about `rows` rows at a time, on compute capability `arch`; not measured."""
    return tiles_for(rows, dtype, arch)


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
    tokens: int, top_k: int, experts: int, hidden: int, ffn_dim: int, splits: int, itemsize: int
) -> tuple[int, int]:
    """Bytes that a call moves, and its operations."""
    weights = used_experts(tokens, top_k, experts) * hidden * ffn_dim * itemsize
    rows = result_rows(tokens, top_k, experts) * (ffn_dim * itemsize + 4 * splits * hidden)
    return round(weights + rows), 2 * tokens * top_k * hidden * ffn_dim


def expert_down(
    inner: torch.Tensor,
    w2: torch.Tensor,
    expert_ids: torch.Tensor,
    starts: torch.Tensor | None,
    rows: int,
) -> tuple[torch.Tensor, int]:
    """What w2 makes of `inner`.

    Args:
        inner: of `expert_up`.
        w2: (experts, hidden, ffn_dim), inner's dtype, last dimension contiguous.
        expert_ids: (tokens, top_k), int32, last dimension contiguous.
        starts: of `expert_plan`; None with up to FEW_TOKENS tokens.
        rows: about how many a tile has, for `tile_config`.

    Returns:
        slots: (splits * rows of inner, hidden), float32.
        splits: into how many parts each sum is cut.
    """
    (experts, hidden, ffn_dim), (tokens, top_k), few = w2.shape, expert_ids.shape, starts is None
    arch, _ = processor(inner.device)
    config, k_split = tile_config(rows, inner.dtype, arch), ffn_dim
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
        expert_ids,
        starts,
        slots,
        tokens,
        top_k,
        experts,
        hidden,
        ffn_dim,
        k_split,
        w2.stride(0),
        w2.stride(1),
        expert_ids.stride(0),
        FEW=few,
        EVEN_K=ffn_dim % config["BLOCK_K"] == 0,
        PAIRS=triton.next_power_of_2(FEW_TOKENS * top_k) if few else 1,
        EXPERTS=1 if few else triton.next_power_of_2(experts),
        **config,
    )
    return slots, splits


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8x7B, each path and tile."""
    cases = []
    for tokens, rows, dtype, name in (
        (1, 1, torch.bfloat16, "bf16"),
        (32, 32, torch.bfloat16, "bf16"),
        (128, 64, torch.bfloat16, "bf16"),
        (4096, 128, torch.bfloat16, "bf16"),
        (4096, 128, torch.float32, "fp32"),
    ):
        few, config = tokens <= FEW_TOKENS, tile_config(rows, dtype, arch)
        k_split = split_config(tokens, 2, 8, 4096, 14336, config) if few else 14336
        moved = work(tokens, 2, 8, 4096, 14336, triton.cdiv(14336, k_split), dtype.itemsize)
        types = {"expert_ids_ptr": "*i32", "starts_ptr": "constexpr" if few else "*i32"}
        types |= {"inner_ptr": f"*{name}", "w2_ptr": f"*{name}", "slots_ptr": "*fp32"}
        numbers = [argument for argument in expert_down_kernel.arg_names if argument.islower()]
        flags = {"FEW": few, "EVEN_K": True, "PAIRS": 64 if few else 1, "EXPERTS": 8}
        cases.append(
            {
                "case": f"{name} {tokens}",
                "kernel": expert_down_kernel,
                "signature": dict.fromkeys(numbers, "i32") | types,
                "constexprs": {**config, **flags},
                "due": ("wgmma" if rows >= 64 else "mma",) if name == "bf16" else (),
                "work": {f"{tokens} tokens of 8x7B": moved} if name == "bf16" else {},
            }
        )
    return cases
