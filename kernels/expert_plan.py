"""Which expert and rows a program of a grouped GEMM works on, planned on the device.

A pair is a (token, slot), numbered token * top_k + slot. Many tokens: `expert_plan` sorts the pairs
by expert, stable and without the skipped ones, and each expert's rows are cut into tiles from its
first row on, so no tile has two experts. Few tokens: no plan, a program reads the ids itself.

Three tokens, top-2 of three experts, ids [0 2] [2 1] [0 -1], in tiles of two rows:

    order   0 4 | 3 | 1 2    pairs of experts 0, 1, 2; pair 5 is skipped
    starts  0     2   3   5  expert e owns rows starts[e] to starts[e + 1]
    places  0 3 4 2 1 -      row of each pair, the inverse of order
    tiles   (0, row 0) (1, row 2) (2, row 3)

The plan reads the ids twice for each expert, from L2: 8 * experts * pairs bytes, and writes
8 * pairs. 4,096 tokens of 8x7B: 0.5 MB, two passes of four steps, some 10 us beside 3 ms of GEMMs.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.matrix_product import tile_place


@triton.jit
def expert_plan_kernel(
    expert_ids_ptr,  # (tokens, top_k) i32; outside [0, experts) is skipped
    starts_ptr,  # (experts + 1,) i32
    order_ptr,  # (pairs,) i32; the pairs of expert e are order[starts[e] : starts[e + 1]]
    places_ptr,  # (pairs,) i32; where a pair stands in order, not written for a skipped one
    pairs,  # i32
    top_k,  # i32
    experts,  # i32
    stride_ids_token,
    BLOCK: tl.constexpr,  # power of two
):
    """Grid (experts,). A program counts and places the pairs of one expert; no atomics."""
    expert = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, pairs, BLOCK):
        ids = load_ids(expert_ids_ptr, first, pairs, top_k, stride_ids_token, BLOCK)
        before += ((ids >= 0) & (ids < expert)).to(tl.int32)
        count += (ids == expert).to(tl.int32)
    row = tl.sum(before)
    tl.store(starts_ptr + expert, row)
    if expert == experts - 1:
        tl.store(starts_ptr + experts, row + tl.sum(count))

    for first in range(0, pairs, BLOCK):
        ids = load_ids(expert_ids_ptr, first, pairs, top_k, stride_ids_token, BLOCK)
        chosen = (ids == expert).to(tl.int32)
        rows = row + tl.cumsum(chosen, 0) - chosen
        pair = first + tl.arange(0, BLOCK)
        tl.store(order_ptr + rows, pair, mask=chosen != 0)
        tl.store(places_ptr + pair, rows, mask=chosen != 0)
        row += tl.sum(chosen)


@triton.jit
def load_ids(expert_ids_ptr, first, pairs, top_k, stride_ids_token, BLOCK: tl.constexpr):
    """Expert ids of BLOCK pairs from `first` on, -1 behind the last."""
    pair = first + tl.arange(0, BLOCK)
    place = (pair // top_k).to(tl.int64) * stride_ids_token + pair % top_k
    return tl.load(expert_ids_ptr + place, mask=pair < pairs, other=-1)


@triton.jit
def tile_rows(
    expert_ids_ptr,  # (tokens, top_k) i32; read with FEW
    starts_ptr,  # (experts + 1,) i32 of the plan; not with FEW
    tokens,
    top_k,
    experts,
    tiles_n,  # column tiles of the result
    stride_ids_token,
    FEW: tl.constexpr,
    PAIRS: tl.constexpr,  # power of two, at least tokens * top_k
    EXPERTS: tl.constexpr,  # power of two, at least experts
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """This program's expert (-1: it has nothing to do), rows, which of them count, column tile.

    A row is one of the plan, or with FEW expert * tokens + token. Rows behind the last are the last
    once more, so that what is looked up for a row needs no mask.
    """
    offs = tl.arange(0, BLOCK_M)
    if FEW:
        pid_n = tl.program_id(0)
        place, pairs = tl.program_id(1), tokens * top_k
        expert = chosen_expert(
            expert_ids_ptr, place, pairs, top_k, experts, stride_ids_token, PAIRS
        )
        first_row = expert * tokens
        last_row = first_row + tokens - 1
    else:
        expert, first_row, last_row, pid_n = planned_tile(
            starts_ptr, experts, tiles_n, BLOCK_M, GROUP_M, EXPERTS
        )
    return expert, tl.minimum(first_row + offs, last_row), first_row + offs <= last_row, pid_n


@triton.jit
def planned_tile(
    starts_ptr,
    experts,
    tiles_n,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Expert (-1: no tile is left), its first row in the tile, its last row, the column tile."""
    offs = tl.arange(0, EXPERTS)
    begin = tl.load(starts_ptr + offs, mask=offs < experts, other=0)
    end = tl.load(starts_ptr + offs + 1, mask=offs < experts, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    ends = tl.cumsum(tiles, 0)  # tiles of all experts up to this one
    tiles_m = tl.sum(tiles)

    pid = tl.program_id(0)
    pid_m, pid_n = tile_place(pid, tiles_m, tiles_n, GROUP_M)

    expert = tl.sum((ends <= pid_m).to(tl.int32))
    own = offs == expert
    first_row = tl.sum(tl.where(own, begin + (pid_m - ends + tiles) * BLOCK_M, 0))
    last_row = tl.sum(tl.where(own, end, 0)) - 1
    return tl.where(pid < tiles_m * tiles_n, expert, -1), first_row, last_row, pid_n


@triton.jit
def chosen_expert(
    expert_ids_ptr, place, pairs, top_k, experts, stride_ids_token, PAIRS: tl.constexpr
):
    """The expert at `place`, a pair where those are fewer than experts, else an expert.

    It is -1 if nobody chose the expert, or if an earlier pair did and so is its place.
    """
    offs = tl.arange(0, PAIRS)
    ids = load_ids(expert_ids_ptr, 0, pairs, top_k, stride_ids_token, PAIRS)
    by_pair = pairs < experts
    expert = tl.where(by_pair, tl.sum(tl.where(offs == place, ids, 0)), place)
    first = tl.min(tl.where(ids == expert, offs, PAIRS))
    owned = tl.where(by_pair, first == place, first < PAIRS)
    return tl.where(owned & (expert >= 0) & (expert < experts), expert, -1)


def tile_config(pairs: int) -> dict[str, int]:
    """Pairs a step and warps; not measured. A chunk of 8x7B takes two steps of 16 ids a thread."""
    block = min(max(triton.next_power_of_2(pairs), 32), 4096)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def work(pairs: int, experts: int) -> tuple[int, int]:
    """Bytes that a call moves, ids in and two places a pair out, and its operations."""
    return 12 * pairs, 8 * experts * pairs


def expert_plan(
    expert_ids: torch.Tensor,
    experts: int,
    starts: torch.Tensor,
    order: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """Writes `starts`, the first starts[experts] elements of `order`, `places` of used pairs.

    Args:
        expert_ids: (tokens, top_k), int32, last dimension contiguous, at least one pair.
        experts: at least 1.
        starts: (experts + 1,), int32.
        order, places: (tokens * top_k,), int32.
    """
    pairs, top_k = expert_ids.numel(), expert_ids.shape[1]
    expert_plan_kernel[(experts,)](
        expert_ids,
        starts,
        order,
        places,
        pairs,
        top_k,
        experts,
        expert_ids.stride(0),
        **tile_config(pairs),
    )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: one step of few pairs, steps of many."""
    return [
        {
            "case": f"{pairs} pairs",
            "kernel": expert_plan_kernel,
            "signature": {
                "expert_ids_ptr": "*i32",
                "starts_ptr": "*i32",
                "order_ptr": "*i32",
                "places_ptr": "*i32",
                "pairs": "i32",
                "top_k": "i32",
                "experts": "i32",
                "stride_ids_token": "i32",
            },
            "constexprs": tile_config(pairs),
            "due": (),
            "work": {"4096 tokens, top-2 of 8": work(pairs, 8)} if pairs == 8192 else {},
        }
        for pairs in (66, 8192)
    ]
