"""Mixtral's router: the k largest logits choose the experts, a softmax over them weighs them.

Equal logits go to the lowest expert index. A NaN sorts first, so its row still gets k distinct
experts, and NaN weights.

Source: Jiang et al. 2024, arXiv 2401.04088.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.checks import Arguments, compute_dtype
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    address,
    cpu_queue,
    cuda_queue,
    define,
    native_extension,
)


def route_experts_reference(logits: Tensor, top_k: int, positions: Tensor | None):
    # A stable sort, unlike topk, promises the lowest index among equals.
    values, order = torch.sort(
        logits.to(compute_dtype(logits.dtype)), dim=-1, descending=True, stable=True
    )
    weights = torch.softmax(values[:, :top_k], -1)
    expert_ids = order[:, :top_k].int()
    if positions is not None:
        idle = (positions < 0)[:, None]
        weights, expert_ids = weights.masked_fill(idle, 0), expert_ids.masked_fill(idle, -1)
    return weights, expert_ids.contiguous()


def route_experts_backward(grads: list[Tensor], needs, logits: Tensor, top_k: int, positions):
    weights, expert_ids = route_experts_reference(logits, top_k, positions)
    grad = grads[0].to(weights.dtype)
    d_chosen = weights * (grad - (grad * weights).sum(-1, keepdim=True))
    # An idle row has weights 0 and so gradient 0; its ids only have to be in range.
    rows = expert_ids.clamp(min=0).long()
    return (torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, rows, d_chosen),)


def _empty_outputs(logits: Tensor, top_k: int, positions: Tensor | None):
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=compute_dtype(logits.dtype)),
        logits.new_empty(shape, dtype=torch.int32),
    )


def _route_experts_native(
    launch, logits: Tensor, top_k: int, positions: Tensor | None, *queue
) -> tuple[Tensor, Tensor]:
    """Calls the C++ or CUDA launcher: raw pointers, sizes, a stride, and where to run it."""
    weights, expert_ids = _empty_outputs(logits, top_k, positions)
    tokens, experts = logits.shape
    launch(
        logits.data_ptr(),
        address(positions),
        weights.data_ptr(),
        expert_ids.data_ptr(),
        tokens,
        experts,
        top_k,
        logits.stride(0),
        KERNEL_DTYPES.index(logits.dtype),
        *queue,
    )
    return weights, expert_ids


def _route_experts_cpu(*inputs):
    return _route_experts_native(native_extension().route_experts_cpu, *inputs, *cpu_queue())


def _route_experts_cuda(logits: Tensor, *rest):
    launch = native_extension().route_experts_cuda
    return _route_experts_native(launch, logits, *rest, *cuda_queue(logits.device))


def _route_experts_triton(logits: Tensor, top_k: int, positions: Tensor | None):
    from mistral_kernels.kernels import route_experts as kernel

    weights, expert_ids = _empty_outputs(logits, top_k, positions)
    kernel.route_experts(logits, top_k, positions, weights, expert_ids)
    return weights, expert_ids


def _route_experts_backward_triton(grads: list[Tensor], needs, logits, top_k: int, positions):
    from mistral_kernels.kernels import route_experts as kernel

    d_logits = logits.new_empty(logits.shape)
    grad = grads[0].contiguous()  # autograd hands over expanded scalars too
    kernel.route_experts_backward(grad, logits, top_k, positions, d_logits)
    return (d_logits,)


def _triton_refuses(facts: dict[str, int]) -> str | None:
    from mistral_kernels.kernels.route_experts import MAX_EXPERTS

    experts = facts.get("experts", 0)
    return (
        None if experts <= MAX_EXPERTS else f"it takes up to {MAX_EXPERTS} experts, got {experts}"
    )


_route_experts = define(
    "route_experts",
    "Tensor logits, int top_k, Tensor? positions",
    "(Tensor, Tensor)",
    fake=_empty_outputs,
    cells={
        "reference": route_experts_reference,
        "cpu": Cell(_route_experts_cpu),
        "triton": Cell(_route_experts_triton, refuses=_triton_refuses),
        "cuda": Cell(_route_experts_cuda),
    },
    facts=lambda logits, top_k, positions: (("experts", logits.shape[1]), ("top_k", top_k)),
    differentiable=("logits",),
    backward={
        "reference": route_experts_backward,
        "triton": Cell(_route_experts_backward_triton, refuses=_triton_refuses),
    },
)


def route_experts(
    logits: Tensor, top_k: int, *, positions: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Chooses top_k experts a token and weighs them.

    Args:
        logits: (tokens, experts), float32, bfloat16 or float16 (float64 on the reference).
        top_k: experts a token, 1 <= top_k <= experts.
        positions: (tokens,), int32; rows with a negative one are idle: ids -1, weights 0. None: all
            rows are live.
        backend: "auto" or a backend's name.

    Returns:
        weights: (tokens, top_k), float32 (float64 for float64 logits), largest first, sum 1.
        expert_ids: (tokens, top_k), int32.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: Jiang et al. 2024, arXiv 2401.04088, section 2.1.
    """
    check = Arguments("route_experts")
    check.tensor("logits", logits, ("tokens", "experts"))
    check.integer("top_k", top_k, 1)
    if top_k > logits.shape[1]:
        raise ValueError(
            f"route_experts: top_k must be <= experts = {logits.shape[1]}, got {top_k}"
        )
    if positions is not None:
        check.tensor("positions", positions, ("tokens",), (torch.int32,))
    check.backend(backend)
    return _route_experts(logits, top_k, positions, backend)
