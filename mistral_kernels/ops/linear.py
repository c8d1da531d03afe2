"""Matrix product with a weight stored as (out, in): y = x weight^T."""

from __future__ import annotations

import functools
import sys

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


def linear_reference(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    if not batch_invariant or x.numel() == 0:
        return functional.linear(x, weight)
    # A BLAS picks its summation order by the number of rows and by alignment, so each row is a
    # product of its own, on a fresh (aligned) copy.
    rows = [functional.linear(row.clone(), weight) for row in x.flatten(0, -2).split(1)]
    return torch.cat(rows).view(*x.shape[:-1], weight.shape[0])


def linear_backward(
    grads: list[Tensor], needs: list[bool], x: Tensor, weight: Tensor, batch_invariant: bool
):
    (grad,), (of_x, of_weight) = grads, needs
    d_x = grad @ weight if of_x else None
    return d_x, grad.flatten(0, -2).mT @ x.flatten(0, -2) if of_weight else None


@functools.cache
def few_rows(dtype: torch.dtype) -> int:
    """The largest number of rows that go to our CPU kernel; torch's GEMM is faster for more.

    Time of torch over ours, weight (1536, 1024), 2 cores of a Xeon (Cascade Lake), torch 2.13:
    float32 2.0 at 16 rows, 1.5 at 32, 1.1 at 64, 0.9 at 128 (1.2 at 48 with 7168 weight rows);
    bfloat16 1.7 at 64, 1.3 at 512; float16 3.8 at 64, 3.6 at 256. With bf16 instructions, of which
    torch makes more than ours (EPYC, Zen 5, 2026-11-23): bfloat16 2.0 for one row, 1.1 to 1.5 at 4,
    0.9 to 1.1 at 8, 0.9 to 1.0 at 16, 0.8 at 64.
    """
    if dtype == torch.float32:
        return 48
    bf16_instructions = "avx512_bf16" in native_extension().instruction_sets()
    return 8 if dtype == torch.bfloat16 and bf16_instructions else sys.maxsize


def _linear_cpu(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    if not batch_invariant and rows.shape[0] > few_rows(x.dtype):
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


def _linear_triton(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    from mistral_kernels.kernels import linear as kernel

    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    kernel.linear(rows, weight, out, batch_invariant)
    return out


_linear = define(
    "linear",
    "Tensor x, Tensor weight, bool batch_invariant",
    "Tensor",
    fake=lambda x, weight, batch_invariant: x.new_empty((*x.shape[:-1], weight.shape[0])),
    cells={
        "reference": linear_reference,
        "cpu": Cell(_linear_cpu),
        # Where any order of sums will do, torch's GEMM is the one to beat, and no measurement says
        # that ours does.
        "triton": Cell(_linear_triton, auto=lambda facts: bool(facts.get("batch_invariant"))),
    },
    facts=lambda x, weight, batch_invariant: (("batch_invariant", int(batch_invariant)),),
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
