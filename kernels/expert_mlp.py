"""expert_mlp in Triton: out[t] = sum over slots of weight * w2[e] (silu(w1[e] x[t]) * w3[e] x[t]).

Three launches: up (gather, both products, SwiGLU), down, combine; many tokens are planned in front.
Intermediates: `inner`, SwiGLU's results in x's dtype, and `slots`, what w2 makes of them, in fp32.

A call reads 3 * hidden * ffn_dim * itemsize bytes of each used expert and does 6 * hidden * ffn_dim
operations a pair. One 8x7B layer in bf16 at the data sheets' 2.0, 3.35, 4.8 TB/s and 312, 989, 989
TFLOP/s of A100, H100, H200 (not measured):

    tokens     GB read    TFLOP    A100       H100       H200
         1       0.70   0.0007     0.35 ms    0.21 ms    0.15 ms    memory
         8       2.54   0.0056     1.3        0.76       0.53       memory, 7.2 experts
     4,096       2.82      2.9     9.2        2.9        2.9        matrix units
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.expert_combine import expert_combine
from mistral_kernels.kernels.expert_plan import expert_plan, tile_rows
from mistral_kernels.kernels.matrix_product import SHARED_BYTES, products

FEW_TOKENS = 32  # up to here a program multiplies its expert with all tokens, and nothing is sorted
BUSY_PROGRAMS = 512  # four for each of 132 multiprocessors


@triton.jit
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
    ffn_dim,  # i32
    stride_x_token,
    stride_w13_expert,
    stride_w13_row,
    stride_ids_token,
    FEW: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of w13: half of them gate, half up
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (tiles,), with FEW (column tiles, experts or pairs, 1). A tile of one expert's rows."""
    half: tl.constexpr = BLOCK_N // 2
    expert, row, mask_m, pid_n = tile_rows(
        expert_ids_ptr,
        starts_ptr,
        tokens,
        top_k,
        experts,
        tl.cdiv(ffn_dim, half),
        stride_ids_token,
        FEW,
        PAIRS,
        EXPERTS,
        BLOCK_M,
        GROUP_M,
    )
    if expert < 0:
        return
    if FEW:
        token = row - expert * tokens
    else:
        token = tl.load(order_ptr + row) // top_k
    a_rows = x_ptr + token.to(tl.int64) * stride_x_token

    # Gate and up rows take turns, so the two factors of an output lie side by side in a thread.
    offs_b = tl.arange(0, BLOCK_N)
    column = tl.minimum(pid_n * half + offs_b // 2, ffn_dim - 1)
    b_rows = w13_ptr + expert.to(tl.int64) * stride_w13_expert
    b_rows += (column + offs_b % 2 * ffn_dim).to(tl.int64) * stride_w13_row
    gate_up = products(a_rows, mask_m, b_rows, 0, hidden, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)

    gate, up = tl.split(tl.reshape(gate_up, (BLOCK_M, half, 2)))
    inner = gate * tl.sigmoid(gate) * up
    offs_n = pid_n * half + tl.arange(0, half)
    inner_ptrs = inner_ptr + row.to(tl.int64)[:, None] * ffn_dim + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < ffn_dim)[None, :]
    tl.store(inner_ptrs, inner.to(inner_ptr.dtype.element_ty), mask=mask)


@triton.jit
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
    EVEN_K: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (tiles,), with FEW (column tiles, experts or pairs, splits)."""
    expert, row, mask_m, pid_n = tile_rows(
        expert_ids_ptr,
        starts_ptr,
        tokens,
        top_k,
        experts,
        tl.cdiv(hidden, BLOCK_N),
        stride_ids_token,
        FEW,
        PAIRS,
        EXPERTS,
        BLOCK_M,
        GROUP_M,
    )
    if expert < 0:
        return
    if FEW:
        begin = tl.program_id(2) * k_split
        end = tl.minimum(begin + k_split, ffn_dim)
    else:
        begin, end = 0, ffn_dim
    a_rows = inner_ptr + row.to(tl.int64) * ffn_dim

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.minimum(offs_n, hidden - 1)
    b_rows = w2_ptr + expert.to(tl.int64) * stride_w2_expert
    b_rows += column.to(tl.int64) * stride_w2_row
    total = products(a_rows, mask_m, b_rows, begin, end, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)

    if FEW:
        row += tl.program_id(2) * experts * tokens
    slot_ptrs = slots_ptr + row.to(tl.int64)[:, None] * hidden + offs_n[None, :]
    tl.store(slot_ptrs, total, mask=mask_m[:, None] & (offs_n < hidden)[None, :])


def tile_config(
    tokens: int,
    top_k: int,
    experts: int,
    dtype: torch.dtype,
    arch: tuple[int, int],
    batch_invariant: bool,
) -> dict[str, int]:
    """Tiles of both GEMMs on compute capability `arch`; not measured.

    Few tokens, or few rows an expert: 64 weight rows of 256 bytes a stage. Two programs fit on a
    multiprocessor and keep some 96 KB of weights on their way, twice what its bandwidth asks for.
    Otherwise BLOCK_M is about twice the mean of an expert's rows: most experts fit into one tile
    and their weights are read once. 128 x 256 is the widest tile whose sums fit into registers.
    batch_invariant: one tile for any number of tokens; 64 rows are the least that wgmma takes.
    """
    few = tokens <= FEW_TOKENS and not batch_invariant
    rows = 64 if batch_invariant else tokens if few else 2 * tokens * top_k // experts
    block_m = min(max(triton.next_power_of_2(rows), 16), 64 if dtype == torch.float32 else 128)
    if dtype == torch.float32:  # no tensor cores: the sums of a thread are what limits
        # 8 warps would spill on sm_100, 4 on sm_90.
        block_n, block_k, num_warps = 64, 32, 4 if arch[0] == 10 else 8
    elif block_m <= 32:
        block_n, block_k, num_warps = 64, 128, 4
    elif block_m == 64:
        block_n, block_k, num_warps = 128, 64, 4
    else:
        # mma keeps its operands in registers, too: with 64 it would spill.
        block_n, block_k, num_warps = 256, 64 if arch[0] in (9, 10) else 32, 8
    stage_bytes = (block_m + block_n) * block_k * dtype.itemsize
    stages = min(5 if block_k == 32 else 4, SHARED_BYTES.get(arch, 99 << 10) // stage_bytes)
    return {
        "FEW": few,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "num_warps": num_warps,
        "num_stages": stages,
    }


def split_config(
    tokens: int, top_k: int, experts: int, hidden: int, ffn_dim: int, config: dict[str, int]
) -> int:
    """How much of ffn_dim a program of the down projection sums; not measured.

    Few tokens: cut until BUSY_PROGRAMS read at a time, but into pieces of four stages at least and
    eight pieces at most, which the combine adds in order. Many tokens: no cut.
    """
    programs = min(experts, tokens * top_k) * triton.cdiv(hidden, config["BLOCK_N"])
    stages = triton.cdiv(ffn_dim, config["BLOCK_K"])
    splits = min(triton.cdiv(BUSY_PROGRAMS, programs), 8, max(stages // 4, 1))
    return triton.cdiv(stages, splits if config["FEW"] else 1) * config["BLOCK_K"]


def work(
    tokens: int, top_k: int, experts: int, hidden: int, ffn_dim: int, splits: int, itemsize: int
) -> dict[str, tuple[int, int]]:
    """Bytes that each kernel moves, and its operations; random routing leaves few experts out."""
    pairs, used = tokens * top_k, experts * (1 - (1 - top_k / experts) ** tokens)
    weights, inner = used * hidden * ffn_dim * itemsize, pairs * ffn_dim * itemsize
    flops = 2 * pairs * hidden * ffn_dim
    return {
        "expert_up_kernel": (round(2 * weights + inner + tokens * hidden * itemsize), 2 * flops),
        "expert_down_kernel": (round(weights + inner + 4 * pairs * splits * hidden), flops),
    }


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
    # The interpreter runs CPU tensors and takes any configuration.
    arch = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    config = tile_config(tokens, top_k, experts, x.dtype, arch, batch_invariant)
    few, block_n = config["FEW"], config["BLOCK_N"]
    k_split = split_config(tokens, top_k, experts, hidden, ffn_dim, config)
    splits = triton.cdiv(ffn_dim, k_split)

    rows, used = tokens * (experts if few else top_k), min(experts, tokens * top_k)
    inner = x.new_empty(rows, ffn_dim)
    slots = x.new_empty(splits * rows, hidden, dtype=torch.float32)
    sizes = (0, 0, 0) if few else (experts + 1, rows, rows)
    starts, order, places = (expert_ids.new_empty(size) for size in sizes)

    def grid(columns: int, parts: int) -> tuple[int, ...]:
        # The most tiles: all used experts but one have one row, and that one has the others.
        tiles_m = used + (rows - used) // config["BLOCK_M"]
        return (columns, used, parts) if few else (columns * tiles_m,)

    common = config | {
        "expert_ids_ptr": expert_ids,
        "starts_ptr": starts,
        "inner_ptr": inner,
        "tokens": tokens,
        "top_k": top_k,
        "experts": experts,
        "hidden": hidden,
        "ffn_dim": ffn_dim,
        "stride_ids_token": expert_ids.stride(0),
        "PAIRS": triton.next_power_of_2(FEW_TOKENS * top_k) if few else 1,
        "EXPERTS": 1 if few else triton.next_power_of_2(experts),
    }
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if not few:
            expert_plan(expert_ids, experts, starts, order, places)
        expert_up_kernel[grid(triton.cdiv(ffn_dim, block_n // 2), 1)](
            x_ptr=x,
            w13_ptr=w13,
            order_ptr=order,
            stride_x_token=x.stride(0),
            stride_w13_expert=w13.stride(0),
            stride_w13_row=w13.stride(1),
            EVEN_K=hidden % config["BLOCK_K"] == 0,
            **common,
        )
        expert_down_kernel[grid(triton.cdiv(hidden, block_n), splits)](
            w2_ptr=w2,
            slots_ptr=slots,
            k_split=k_split,
            stride_w2_expert=w2.stride(0),
            stride_w2_row=w2.stride(1),
            EVEN_K=ffn_dim % config["BLOCK_K"] == 0,
            **common,
        )
        expert_combine(slots, weights, expert_ids, None if few else places, out, experts, splits)


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
        config = tile_config(tokens, 2, 8, dtype, arch, False)
        due = "wgmma" if config["BLOCK_M"] >= 64 else "mma"
        splits = triton.cdiv(14336, split_config(tokens, 2, 8, 4096, 14336, config))
        works = work(tokens, 2, 8, 4096, 14336, splits, dtype.itemsize)
        types = dict.fromkeys(("expert_ids_ptr", "starts_ptr", "order_ptr"), "*i32")
        types["slots_ptr"] = "*fp32"
        for kernel in (expert_up_kernel, expert_down_kernel):
            pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
            numbers = [argument for argument in kernel.arg_names if argument.islower()]
            signature = dict.fromkeys(numbers, "i32") | dict.fromkeys(pointers, f"*{name}")
            cases.append(
                {
                    "case": f"{name} {tokens}",
                    "kernel": kernel,
                    "signature": signature | {k: types[k] for k in types if k in signature},
                    "constexprs": {**config, "EVEN_K": True, "PAIRS": 64, "EXPERTS": 8},
                    "due": (due,) if name == "bf16" else (),
                    "work": {f"{tokens} tokens of 8x7B": works[kernel.__name__]}
                    if name == "bf16"
                    else {},
                }
            )
    return cases
