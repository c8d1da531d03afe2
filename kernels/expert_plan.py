"""Which rows of expert_mlp's grouped GEMMs belong to which expert, planned on the device.

A pair is a (token, slot), numbered token * top_k + slot. The plan sorts the pairs by expert, stable
and without the skipped ones. Three tokens, top-2 of three experts, ids [0 2] [2 1] [0 -1]:

    order   0 4 | 3 | 1 2    pairs of experts 0, 1, 2; pair 5 is skipped
    starts  0     2   3   5  expert e owns rows starts[e] to starts[e + 1]
    places  0 3 4 2 1 -      row of each pair, the inverse of order

The plan reads the ids twice for each expert, from L2: 8 * experts * pairs bytes, and writes
8 * pairs. 2,048 tokens of 8x7B, a chunk: 0.26 MB, some 10 us beside 1.5 ms of GEMMs.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pairs"])  # another number of tokens must not compile it anew
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


def tile_config(pairs: int) -> dict[str, int]:
    """Pairs a step and warps; not measured. A chunk of 8x7B takes two steps of 16 ids a thread.

    Only two sizes, for each is a compilation.
    """
    many = pairs > 1024
    return {"BLOCK": 4096 if many else 256, "num_warps": 8 if many else 1}


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
