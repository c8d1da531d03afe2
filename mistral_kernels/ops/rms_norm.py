"""RMSNorm, plain and with the residual add in front of it.

    rms_norm(x)     = x / sqrt(mean(x^2) + eps) * weight
    add_rms_norm(x) = rms_norm(s), s        with s = x + residual, rounded to x's dtype

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
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


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    value = x.to(compute_dtype(x.dtype)).contiguous()  # so that strides do not change the bits
    inverse = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * inverse * weight.to(value.dtype)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float):
    summed = (x + residual).contiguous()
    return rms_norm_reference(summed, weight, eps), summed


def rms_norm_backward(grads: list[Tensor], needs: list[bool], x: Tensor, weight: Tensor, eps):
    value = x.to(compute_dtype(x.dtype))
    grad = grads[0].to(value.dtype)
    inverse = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    normed = value * inverse
    d_normed = grad * weight.to(value.dtype)
    d_x = inverse * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return d_x, _as_rows(grad * normed).sum(0) if needs[-1] else None


def add_rms_norm_backward(grads: list[Tensor], needs, x: Tensor, residual: Tensor, weight, eps):
    d_summed, d_weight = rms_norm_backward(grads[:1], needs, x + residual, weight, eps)
    d_summed = d_summed + grads[1]
    return d_summed, d_summed.clone(), d_weight


def _as_rows(x: Tensor) -> Tensor:
    """(..., hidden) as (tokens, hidden), a view wherever the strides allow it."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _rms_norm_native(
    launch, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *queue
):
    """Calls the C++ or CUDA launcher: raw pointers, sizes, token strides, and where to run it."""
    rows = _as_rows(x)
    added = rows if residual is None else _as_rows(residual)
    tokens, hidden = rows.shape
    normed = x.new_empty(*x.shape)
    summed = None if residual is None else x.new_empty(*x.shape)
    launch(
        rows.data_ptr(),
        0 if residual is None else added.data_ptr(),
        weight.data_ptr(),
        normed.data_ptr(),
        address(summed),
        tokens,
        hidden,
        rows.stride(0),
        added.stride(0),
        eps,
        KERNEL_DTYPES.index(x.dtype),  # the order of csrc/dtype.h
        *queue,
    )
    return normed if summed is None else (normed, summed)


def _rms_norm_cpu(x, residual, weight, eps):
    launch = native_extension().rms_norm_cpu
    return _rms_norm_native(launch, x, residual, weight, eps, *cpu_queue())


def _rms_norm_cuda(x, residual, weight, eps):
    launch = native_extension().rms_norm_cuda
    return _rms_norm_native(launch, x, residual, weight, eps, *cuda_queue(x.device))


def _rms_norm_triton(x, residual, weight, eps):
    from mistral_kernels.kernels import rms_norm as kernel

    normed = x.new_empty(x.shape)
    summed = None if residual is None else x.new_empty(x.shape)
    kernel.rms_norm(
        _as_rows(x),
        None if residual is None else _as_rows(residual),
        weight,
        _as_rows(normed),
        None if summed is None else _as_rows(summed),
        eps,
    )
    return normed if summed is None else (normed, summed)


def _add_rms_norm_backward_triton(grads, needs, x, residual, weight, eps):
    from mistral_kernels.kernels import rms_norm_backward as kernel

    d_x, d_weight = x.new_empty(x.shape), weight.new_empty(weight.shape) if needs[-1] else None
    d_residual = None if residual is None else x.new_empty(x.shape)
    grads = [_as_rows(grad.contiguous()) for grad in grads]  # autograd may hand over any strides
    kernel.rms_norm_backward(
        grads[0],
        None if residual is None else grads[1],
        _as_rows(x),
        None if residual is None else _as_rows(residual),
        weight,
        _as_rows(d_x),
        None if d_residual is None else _as_rows(d_residual),
        d_weight,
        eps,
    )
    return (d_x, d_weight) if d_residual is None else (d_x, d_residual, d_weight)


def _rms_norm_backward_triton(grads, needs, x, weight, eps):
    return _add_rms_norm_backward_triton(grads, needs, x, None, weight, eps)


_rms_norm = define(
    "rms_norm",
    "Tensor x, Tensor weight, float eps",
    "Tensor",
    fake=lambda x, weight, eps: x.new_empty(x.shape),
    cells={
        "reference": rms_norm_reference,
        "cpu": Cell(lambda x, weight, eps: _rms_norm_cpu(x, None, weight, eps)),
        "triton": Cell(lambda x, weight, eps: _rms_norm_triton(x, None, weight, eps)),
        "cuda": Cell(lambda x, weight, eps: _rms_norm_cuda(x, None, weight, eps)),
    },
    differentiable=("x", "weight"),
    backward={"reference": rms_norm_backward, "triton": Cell(_rms_norm_backward_triton)},
)

_add_rms_norm = define(
    "add_rms_norm",
    "Tensor x, Tensor residual, Tensor weight, float eps",
    "(Tensor, Tensor)",
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    cells={
        "reference": add_rms_norm_reference,
        "cpu": Cell(_rms_norm_cpu),
        "triton": Cell(_rms_norm_triton),
        "cuda": Cell(_rms_norm_cuda),
    },
    differentiable=("x", "residual", "weight"),
    backward={"reference": add_rms_norm_backward, "triton": Cell(_add_rms_norm_backward_triton)},
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Root-mean-square norm over the last dimension, computed in fp32 and rounded once.

    Args:
        x: (..., hidden), float32, bfloat16 or float16 (float64 on the reference).
        weight: (hidden,), x's dtype.
        eps: added to the mean square, >= 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        (..., hidden), contiguous, x's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    check = Arguments("rms_norm")
    check.tensor("x", x, ("...", "hidden"))
    check.tensor("weight", weight, ("hidden",), (x.dtype,))
    check.integer("weight.shape[0] (hidden)", weight.shape[0], 1)
    check.positive("eps", eps, zero=True)
    check.backend(backend)
    return _rms_norm(x, weight, eps, backend)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Adds the residual stream and norms the sum, in one pass over memory.

    Args:
        x: (..., hidden), the block's output; float32, bfloat16 or float16 (float64 on the
            reference).
        residual: (..., hidden), x's shape and dtype.
        weight: (hidden,), x's dtype.
        eps: added to the mean square, >= 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        normed, summed: (..., hidden) each, contiguous, x's dtype; summed = x + residual.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467; the pre-norm residual of Mistral 7B.
    """
    check = Arguments("add_rms_norm")
    check.tensor("x", x, ("...", "hidden"))
    check.tensor("residual", residual, ("...", "hidden"), (x.dtype,))
    if residual.shape != x.shape:
        raise ValueError(
            f"add_rms_norm: residual must have x's shape {tuple(x.shape)},"
            f" got {tuple(residual.shape)}"
        )
    check.tensor("weight", weight, ("hidden",), (x.dtype,))
    check.integer("weight.shape[0] (hidden)", weight.shape[0], 1)
    check.positive("eps", eps, zero=True)
    check.backend(backend)
    return _add_rms_norm(x, residual, weight, eps, backend)
