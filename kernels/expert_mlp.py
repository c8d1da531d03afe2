"""expert_mlp in Triton: out[t] = sum over slots of weight * w2[e] (silu(w1[e] x[t]) * w3[e] x[t]).

Three launches: up (gather, both products, SwiGLU), down, combine; many tokens are planned in front
and worked by persistent programs in an order that L2 likes (expert_tiles says how and why).
Intermediates: `inner`, SwiGLU's results in x's dtype, and `slots`, what w2 makes of them, in fp32.

A call reads 3 * hidden * ffn_dim * itemsize bytes of each used expert and does 6 * hidden * ffn_dim
operations a pair. One 8x7B layer in bf16 at the data sheets' 2.0, 3.35, 4.8 TB/s and 312, 989, 989
TFLOP/s of A100, H100, H200 (not measured):

    tokens     GB read    TFLOP    A100       H100       H200
         1       0.70   0.0007     0.35 ms    0.21 ms    0.15 ms    memory
         8       2.54   0.0056     1.3        0.76       0.53       memory, 7.2 experts
     4,096       5.64      2.9     9.2        2.9        2.9        matrix units, in two chunks
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.expert_combine import expert_combine
from mistral_kernels.kernels.expert_plan import expert_plan
from mistral_kernels.kernels.expert_tiles import (
    FEW_TOKENS,
    programs,
    tile_rows,
    tiles_for,
    tiles_of_program,
    used_experts,
)
from mistral_kernels.kernels.expert_up import expert_up
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


def tile_config(
    tokens: int,
    top_k: int,
    experts: int,
    dtype: torch.dtype,
    arch: tuple[int, int],
    batch_invariant: bool,
) -> dict[str, int]:
    """Tiles of both GEMMs on compute capability `arch`; not measured.

    Few tokens: all of them in one tile. Otherwise BLOCK_M is about twice the mean of an expert's
    rows: most experts fit into one tile and their weights are read once. batch_invariant: one tile
    for any number of tokens; 64 rows are the least that wgmma takes.
    """
    few = tokens <= FEW_TOKENS and not batch_invariant
    rows = 64 if batch_invariant else tokens if few else 2 * tokens * top_k // experts
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
    """Bytes that expert_down_kernel moves, and its operations."""
    weights = used_experts(tokens, top_k, experts) * hidden * ffn_dim * itemsize
    rows = tokens * top_k * (ffn_dim * itemsize + 4 * splits * hidden)
    return round(weights + rows), 2 * tokens * top_k * hidden * ffn_dim


def bytes_a_token(top_k: int, hidden: int, ffn_dim: int, dtype: torch.dtype) -> int:
    """Workspace of a token among many: `inner`, `slots`, its places in the plan."""
    return top_k * (ffn_dim * dtype.itemsize + hidden * 4 + 8)


def expert_mlp(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    out: torch.Tensor,
    batch_invariant: bool,
) -> None:
    """Writes `out`.

    Args:
        x: (tokens, hidden), any float dtype; all inputs have a contiguous last dimension.
        w13: (experts, 2 * ffn_dim, hidden), gate rows first, x's dtype.
        w2: (experts, hidden, ffn_dim), x's dtype.
        weights: (tokens, top_k), float32.
        expert_ids: (tokens, top_k), int32; outside [0, experts) is skipped.
        out: (tokens, hidden), x's dtype, contiguous.
        batch_invariant: the same tiles and order of sums for any number of tokens.
    """
    (tokens, hidden), (experts, _, ffn_dim), top_k = x.shape, w2.shape, weights.shape[1]
    if tokens == 0 or w2.numel() == 0:
        out.zero_()  # without experts every slot is skipped
        return
    arch, _ = processor(x.device)
    config = tile_config(tokens, top_k, experts, x.dtype, arch, batch_invariant)
    few = tokens <= FEW_TOKENS and not batch_invariant
    k_split = ffn_dim
    if few:
        k_split = split_config(tokens, top_k, experts, hidden, ffn_dim, config)
    splits = triton.cdiv(ffn_dim, k_split)

    rows, used = tokens * (experts if few else top_k), min(experts, tokens * top_k)
    inner = x.new_empty(rows, ffn_dim)
    slots = x.new_empty(splits * rows, hidden, dtype=torch.float32)
    grid = (triton.cdiv(hidden, config["BLOCK_N"]), used, splits)
    starts = order = places = None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if not few:
            starts, order, places = (expert_ids.new_empty(n) for n in (experts + 1, rows, rows))
            expert_plan(expert_ids, experts, starts, order, places)
            grid = (programs(x, config),)
        w1_w3 = w13.unflatten(1, (2, ffn_dim))
        expert_up(x, w1_w3, expert_ids, starts, order, inner, config, gate_up=False)
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
        expert_combine(slots, weights, expert_ids, places, out, experts, splits)


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8x7B, each path and tile."""
    cases = []
    for tokens, dtype, name in (
        (1, torch.bfloat16, "bf16"),
        (32, torch.bfloat16, "bf16"),
        (128, torch.bfloat16, "bf16"),
        (4096, torch.bfloat16, "bf16"),
        (4096, torch.float32, "fp32"),
    ):
        few, config = tokens <= FEW_TOKENS, tile_config(tokens, 2, 8, dtype, arch, False)
        due = "wgmma" if config["BLOCK_M"] >= 64 else "mma"
        k_split = split_config(tokens, 2, 8, 4096, 14336, config) if few else 14336
        moved = work(tokens, 2, 8, 4096, 14336, triton.cdiv(14336, k_split), dtype.itemsize)
        types = {"expert_ids_ptr": "*i32", "starts_ptr": "constexpr" if few else "*i32"}
        types |= {"inner_ptr": f"*{name}", "w2_ptr": f"*{name}", "slots_ptr": "*fp32"}
        numbers = [argument for argument in expert_down_kernel.arg_names if argument.islower()]
        sizes = {"PAIRS": 64 if few else 1, "EXPERTS": 8}
        cases.append(
            {
                "case": f"{name} {tokens}",
                "kernel": expert_down_kernel,
                "signature": dict.fromkeys(numbers, "i32") | types,
                "constexprs": {**config, **sizes, "FEW": few, "EVEN_K": True},
                "due": (due,) if name == "bf16" else (),
                "work": {f"{tokens} tokens of 8x7B": moved} if name == "bf16" else {},
            }
        )
    return cases
