"""Adds what the experts made of each token: out[t] = sum over slots of weight * value, in fp32.

A token reads 4 * top_k * splits * hidden bytes and writes hidden * itemsize: bound by memory. 4,096
tokens of 8x7B in bf16: 0.17 GB, 0.08, 0.05, 0.04 ms on A100, H100, H200 (not measured).
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])  # a batch of one must not compile it anew
def expert_combine_kernel(
    slots_ptr,  # (rows, hidden) fp32: by place, or without a plan (splits, experts, tokens) rows
    weights_ptr,  # (tokens, top_k) fp32; None: all are 1
    expert_ids_ptr,  # (tokens, top_k) i32
    places_ptr,  # (tokens * top_k,) i32 of the plan; unused without HAS_PLAN
    out_ptr,  # (tokens, hidden), contiguous
    tokens,  # i32
    top_k,  # i32
    experts,  # i32
    hidden,  # i32
    stride_weights_token,
    stride_ids_token,
    HAS_PLAN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (tokens, column tiles). Adds splits, then slots, in order; skipped ones are not read."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(top_k):
        expert = tl.load(expert_ids_ptr + token * stride_ids_token + slot)
        used = (expert >= 0) & (expert < experts)
        mask = (offs < hidden) & used
        value = tl.zeros([BLOCK], tl.float32)
        for split in range(SPLITS):
            if HAS_PLAN:
                row = tl.load(places_ptr + token * top_k + slot, mask=used, other=0).to(tl.int64)
            else:
                row = (split * experts + expert).to(tl.int64) * tokens + token
            value += tl.load(slots_ptr + row * hidden + offs, mask=mask, other=0.0)
        if weights_ptr is not None:
            weight_ptr = weights_ptr + token * stride_weights_token + slot
            value *= tl.load(weight_ptr, mask=used, other=0.0)
        total += value
    out_ptrs = out_ptr + token * hidden + offs
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=offs < hidden)


def tile_config(hidden: int) -> dict[str, int]:
    """Columns of a program; not measured. Two 16-byte loads of fp32 a thread for each slot."""
    block = min(triton.next_power_of_2(hidden), 1024)
    return {"BLOCK": block, "num_warps": max(block // 256, 1)}


def work(tokens: int, top_k: int, splits: int, hidden: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a call moves, and its operations."""
    values = tokens * top_k * splits * hidden
    return 4 * values + tokens * hidden * dtype.itemsize, 2 * values


def expert_combine(
    slots: torch.Tensor,
    weights: torch.Tensor | None,
    expert_ids: torch.Tensor,
    places: torch.Tensor | None,
    out: torch.Tensor,
    experts: int,
    splits: int,
) -> None:
    """Writes `out`.

    Args:
        slots: float32, (pairs, hidden) by place, or (splits * experts * tokens, hidden).
        weights: (tokens, top_k), float32, last dimension contiguous; None: all are 1.
        expert_ids: (tokens, top_k), int32, last dimension contiguous; outside [0, experts) a slot
            adds nothing.
        places: (tokens * top_k,), int32, of `expert_plan`; None: slots go by split, expert, token.
        out: (tokens, hidden), any float dtype, contiguous.
        experts: how many there are.
        splits: parts of a sum, added in order; 1 with places.
    """
    (tokens, top_k), hidden = expert_ids.shape, out.shape[1]
    config = tile_config(hidden)
    expert_combine_kernel[(tokens, triton.cdiv(hidden, config["BLOCK"]))](
        slots,
        weights,
        expert_ids,
        places,
        out,
        tokens,
        top_k,
        experts,
        hidden,
        0 if weights is None else weights.stride(0),
        expert_ids.stride(0),
        HAS_PLAN=places is not None,
        SPLITS=splits,
        **config,
    )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8x7B with a plan, cut in four, of d_x."""
    cases = []
    for name, tokens, splits, has_plan, has_weights, what in (
        ("bf16", 4096, 1, True, True, ""),
        ("bf16", 1, 4, False, True, ", 4 splits"),
        ("bf16", 4096, 1, True, False, ", d_x"),
        ("fp32", 1, 4, False, True, ", 4 splits"),
    ):
        numbers = [argument for argument in expert_combine_kernel.arg_names if argument.islower()]
        signature = dict.fromkeys(numbers, "i32") | {"slots_ptr": "*fp32", "out_ptr": f"*{name}"}
        signature["expert_ids_ptr"] = "*i32"
        signature["weights_ptr"] = "*fp32" if has_weights else "constexpr"
        signature["places_ptr"] = "*i32" if has_plan else "constexpr"
        shape = f"{tokens} tokens of 8x7B{what}"
        cases.append(
            {
                "case": f"{name} {tokens}{what}",
                "kernel": expert_combine_kernel,
                "signature": signature,
                "constexprs": {"HAS_PLAN": has_plan, "SPLITS": splits, **tile_config(4096)},
                "due": ("load_16", "store_16"),
                "work": {shape: work(tokens, 2, splits, 4096, torch.bfloat16)}
                if name == "bf16" and has_weights
                else {},
            }
        )
    return cases
