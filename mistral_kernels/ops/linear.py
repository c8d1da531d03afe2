"""Matrix product with a weight stored as (out, in): y = x weight^T."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mistral_kernels.ops.checks import Arguments
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    cpu_queue,
    define,
    native_extension,
)

FEW_ROWS = {torch.float32: 8, torch.bfloat16: 8, torch.float16: 8}


def linear_reference(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    if not batch_invariant or x.numel() == 0:
        return functional.linear(x, weight)
    # A BLAS picks its summation order by the number of rows and by alignment, so each row is a
    # product of its own, on a fresh (aligned) copy.
    rows = [functional.linear(row.clone(), weight) for row in x.flatten(0, -2).split(1)]
    return torch.cat(rows).view(*x.shape[:-1], weight.shape[0])


def linear_backward(grads: list[Tensor], x: Tensor, weight: Tensor, batch_invariant: bool):
    grad = grads[0]
    return grad @ weight, grad.flatten(0, -2).mT @ x.flatten(0, -2)


def _linear_cpu(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    if not batch_invariant and len(rows) > FEW_ROWS[x.dtype]:
        return functional.linear(x, weight)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    native_extension().linear_cpu(
        rows.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        *rows.shape,
        weight.shape[0],
        rows.stride(0),
        weight.stride(0),
        KERNEL_DTYPES.index(x.dtype),
        *cpu_queue(),
    )
    return out


_linear = define(
    "linear",
    "Tensor x, Tensor weight, bool batch_invariant",
    "Tensor",
    fake=lambda x, weight, batch_invariant: x.new_empty((*x.shape[:-1], weight.shape[0])),
    cells={"reference": linear_reference, "cpu": Cell(_linear_cpu)},
    differentiable=("x", "weight"),
    backward=linear_backward,
)


def linear(
    x: Tensor, weight: Tensor, *, batch_invariant: bool = False, backend: str = "auto"
) -> Tensor:
    """x times weight transposed.

    Args:
        x: (..., in), float32, bfloat16 or float16 (float64 on the reference); at least 2-D.
        weight: (out, in), x's dtype.
        batch_invariant: a row's bits do not depend on how many other rows there are.
        backend: "auto" or a backend's name.

    Returns:
        (..., out), x's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: `torch.nn.functional.linear`, without a bias.
    """
    check = Arguments("linear")
    check.tensor("x", x, ("...", "tokens", "in"))
    check.tensor("weight", weight, ("out", "in"), (x.dtype,))
    check.flag("batch_invariant", batch_invariant)
    check.backend(backend)
    return _linear(x, weight, batch_invariant, backend)
