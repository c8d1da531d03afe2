"""Gradients of expert_mlp in Triton, from its inputs: what lies between is worked out once more.

For each used (token, slot) pair, a row of the plan, with g = grad[token], w = its weight:

    gate, up  = w1[e] x, w3[e] x       inner  = silu(gate) * up
    d_inner   = w2[e]^T g              d_w    = <d_inner, inner>
    d_gate_up = w * d_inner * up * silu'(gate), w * d_inner * silu(gate), in turn
    d_w2[e]   = sum over rows of g (w * inner)^T
    d_w13[e]  = sum over rows of d_gate_up x^T
    d_x       = sum over slots of w13[e]^T d_gate_up

Five GEMMs, of which those of d_w13, d_w2 and d_x are left out where nobody asks for them, worked in
slices of ffn_dim. A slice of d_w13 and d_w2 is whole, so each is written once in its own dtype;
slices of tokens would want fp32 sums of all weights, 5.6 GB for 8x7B, read and written for each. A
slice carries on the sums of d_w and d_x where the one before ended, so their number changes no bit.
gate_up, overwritten by its gradient, and d_inner, by inner, have the workspace that the caller
allows; what grows with tokens is d_x's slots, 4 * hidden bytes a pair.
SwiGLU is a pass of its own: at the end of d_inner's GEMM gate, up and their gradients would spill.

A pair takes 16 * hidden * ffn_dim operations, the forward 6. 4,096 tokens of an 8x7B layer in bf16:
7.7 TFLOP, and 12 GB: w13 read twice, w2 once, 2.8 GB of gradients written, the rest for rows. At
312, 989, 989 TFLOP/s of A100, H100, H200: 25, 7.8, 7.8 ms; bytes alone 6, 3.6, 2.5 ms (not
measured).
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.expert_combine import expert_combine
from mistral_kernels.kernels.expert_matrix_backward import expert_matrix_backward
from mistral_kernels.kernels.expert_plan import expert_plan
from mistral_kernels.kernels.expert_rows_backward import expert_rows_backward
from mistral_kernels.kernels.expert_tiles import expert_rows
from mistral_kernels.kernels.expert_up import expert_up


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr,  # (pairs, 2 * columns), x's dtype: gate and up in turn; their gradients after
    d_inner_ptr,  # (pairs, columns) fp32
    inner_ptr,  # weight * inner is written, x's dtype, where d_inner was: rows begin alike
    weights_ptr,  # (tokens, top_k) fp32, last dimension contiguous
    starts_ptr,  # (experts + 1,) i32 of the plan
    order_ptr,  # (pairs,) i32 of the plan
    d_weights_ptr,  # (tokens, top_k) fp32, contiguous: the sum over earlier columns is added to
    top_k,  # i32
    experts,  # i32
    columns,  # i32
    stride_inner_row,
    stride_weights_token,
    BLOCK: tl.constexpr,
):
    """Grid (pairs,). A planned row."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(starts_ptr + experts):
        pair = tl.load(order_ptr + row)
        token = (pair // top_k).to(tl.int64)
        weight = tl.load(weights_ptr + token * stride_weights_token + pair % top_k)
        d_weight = tl.load(d_weights_ptr + pair)
        gate_up_ptr += row * 2 * columns
        d_inner_ptr += row * columns
        inner_ptr += row * stride_inner_row
        for first in range(0, columns, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            both = 2 * first + tl.arange(0, 2 * BLOCK)
            mask, mask_both = offs < columns, both < 2 * columns
            d_inner = tl.load(d_inner_ptr + offs, mask=mask, other=0.0)
            gate_up = tl.load(gate_up_ptr + both, mask=mask_both, other=0.0).to(tl.float32)
            tl.debug_barrier()  # all threads have read what is overwritten now

            gate, up = tl.split(tl.reshape(gate_up, (BLOCK, 2)))
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            d_weight += tl.sum(d_inner * silu * up)
            tl.store(inner_ptr + offs, (weight * silu * up).to(inner_ptr.dtype.element_ty), mask)
            d_gate = weight * d_inner * up * (sigmoid + silu * (1 - sigmoid))
            d_gate_up = tl.reshape(tl.join(d_gate, weight * d_inner * silu), (2 * BLOCK,))
            tl.store(gate_up_ptr + both, d_gate_up.to(gate_up_ptr.dtype.element_ty), mask_both)
        tl.store(d_weights_ptr + pair, d_weight)


def tile_config(ffn_dim: int) -> dict[str, int]:
    """Columns a step: two 16-byte loads each of d_inner and gate_up a thread; not measured."""
    block = min(triton.next_power_of_2(ffn_dim), 512)
    return {"BLOCK": block, "num_warps": max(block // 256, 1)}


def work(pairs: int, ffn_dim: int) -> tuple[int, int]:
    """Bytes that swiglu_backward_kernel moves in bf16, all columns, and its operations."""
    return (2 * 4 + 4 + 2) * pairs * ffn_dim, 20 * pairs * ffn_dim


def slice_columns(bytes_a_column: int, ffn_dim: int, unit: int, workspace_bytes: int) -> int:
    """How many columns of ffn_dim are worked at a time, a multiple of `unit`, as even as can be."""
    most = max(workspace_bytes // (bytes_a_column * unit), 1) * unit
    return triton.cdiv(triton.cdiv(ffn_dim, triton.cdiv(ffn_dim, most)), unit) * unit


def _swiglu_backward(gate_up, d_inner, inner, weights, starts, order, d_weights, config) -> None:
    """Overwrites gate_up and inner, adds to d_weights, as the kernel says."""
    swiglu_backward_kernel[(len(order),)](
        gate_up,
        d_inner,
        inner,
        weights,
        starts,
        order,
        d_weights,
        weights.shape[1],
        len(starts) - 1,
        d_inner.shape[1],
        inner.stride(0),
        weights.stride(0),
        **config,
    )


def expert_mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    d_x: torch.Tensor | None,
    d_w13: torch.Tensor | None,
    d_w2: torch.Tensor | None,
    d_weights: torch.Tensor | None,
    batch_invariant: bool,
    workspace_bytes: int,
) -> None:
    """Writes those of `d_x`, `d_w13`, `d_w2`, `d_weights` that are not None.

    Args:
        grad: (tokens, hidden), x's dtype; all inputs have a contiguous last dimension.
        x, w13, w2, weights, expert_ids: as in the forward.
        d_x, d_w13, d_w2, d_weights: shapes and dtypes of x, w13, w2, weights; contiguous.
        batch_invariant: rows of d_x and d_weights do not depend on the other rows.
        workspace_bytes: for gate_up and d_inner, at most, unless they need more for one step.
    """
    (tokens, hidden), (experts, _, ffn_dim), top_k = x.shape, w2.shape, weights.shape[1]
    if tokens == 0 or w2.numel() == 0:
        for gradient in (d_x, d_w13, d_w2, d_weights):
            if gradient is not None:
                gradient.zero_()
        return
    rows, swiglu = expert_rows(tokens, top_k, experts, batch_invariant), tile_config(ffn_dim)
    # Slices end where a step of d_weights does, and with it one of d_x.
    pairs, step = tokens * top_k, swiglu["BLOCK"]
    width = slice_columns(pairs * (2 * x.itemsize + 4), ffn_dim, step, workspace_bytes)
    plan = starts, order, places = [expert_ids.new_empty(n) for n in (experts + 1, pairs, pairs)]
    slots = None if d_x is None else x.new_empty(pairs, hidden, dtype=torch.float32)
    if d_weights is None:  # it falls off
        d_weights = weights.new_empty(weights.shape)
    gate_up_memory = x.new_empty(pairs * 2 * min(width, ffn_dim))
    inner_memory = x.new_empty(pairs * min(width, ffn_dim), dtype=torch.float32)
    w13 = w13.unflatten(1, (2, ffn_dim))
    d_w13 = None if d_w13 is None else d_w13.unflatten(1, (2, ffn_dim))

    with torch.cuda.device_of(x):  # Triton launches on the current device
        d_weights.zero_()
        expert_plan(expert_ids, experts, *plan)
        for first in range(0, ffn_dim, width):
            part = slice(first, min(first + width, ffn_dim))
            columns, add = part.stop - first, first > 0
            gate_up = gate_up_memory[: pairs * 2 * columns].view(pairs, -1)
            d_inner = inner_memory[: pairs * columns].view(pairs, -1)
            inner = d_inner.view(x.dtype)[:, :columns]
            own_w13, own_w2 = w13[:, :, part], w2[:, :, part]
            expert_up(x, own_w13, expert_ids, starts, order, gate_up, rows, gate_up=True)
            expert_rows_backward(grad, own_w2, starts, order, d_inner, top_k, rows, add=False)
            _swiglu_backward(gate_up, d_inner, inner, weights, starts, order, d_weights, swiglu)
            if d_w2 is not None:
                expert_matrix_backward(grad, inner, starts, order, d_w2[:, :, part], top_k)
            if d_w13 is not None:
                expert_matrix_backward(gate_up, x, starts, order, d_w13[:, :, part], top_k)
            if d_x is not None:
                expert_rows_backward(gate_up, own_w13, starts, order, slots, top_k, rows, add)
        if d_x is not None:
            expert_combine(slots, None, expert_ids, places, d_x, experts, 1)


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: 8x7B."""
    kernel = swiglu_backward_kernel
    numbers = [argument for argument in kernel.arg_names if argument.islower()]
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("starts_ptr", "order_ptr"), "*i32")
    types |= dict.fromkeys(("d_inner_ptr", "weights_ptr", "d_weights_ptr"), "*fp32")
    return [
        {
            "case": name,
            "kernel": kernel,
            "signature": types | dict.fromkeys(("gate_up_ptr", "inner_ptr"), f"*{name}"),
            "constexprs": tile_config(14336),
            "due": ("load_16", "store_16"),
            "work": {"4096 tokens of 8x7B": work(8192, 14336)} if name == "bf16" else {},
        }
        for name in ("bf16", "fp32")
    ]
