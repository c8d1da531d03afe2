"""Matrix product with a low-bit weight stored as (out, in): y = x dequantise(weight)^T.

The layout of the weight is that of `mistral_kernels.ops.low_bit`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mistral_kernels.ops.checks import Arguments, compute_dtype
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    Facts,
    cuda_queue,
    define,
    native_extension,
)
from mistral_kernels.ops.low_bit import (
    LowBit,
    check_low_bit,
    cuda_facts,
    cuda_refuses,
    launch_fields,
    triton_refuses,
    word_alignment,
)


def linear_low_bit_reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    perm: Tensor | None,
) -> Tensor:
    dtype = compute_dtype(x.dtype)
    weight = LowBit(qweight, scales, zeros, perm).dequantise(dtype)
    return functional.linear(x.to(dtype), weight).to(x.dtype)


def _launch(launch, x: Tensor, weight: LowBit, out: Tensor, *queue) -> None:
    """Calls the CUDA launcher: raw pointers, sizes, strides, and where to run it."""
    launch(
        x.data_ptr(),
        launch_fields(weight),
        out.data_ptr(),
        *x.shape,
        weight.shape[0],
        x.stride(0),
        KERNEL_DTYPES.index(x.dtype),
        *queue,
    )


def _linear_low_bit_cuda(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    perm: Tensor | None,
) -> Tensor:
    out = x.new_empty((*x.shape[:-1], qweight.shape[0]))
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    launch = native_extension().linear_low_bit_cuda
    _launch(launch, rows, LowBit(qweight, scales, zeros, perm), out, *cuda_queue(x.device))
    return out


def _cuda_refuses(facts: dict[str, int]) -> str | None:
    return cuda_refuses("rows", facts)


def _linear_low_bit_triton(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    perm: Tensor | None,
) -> Tensor:
    from mistral_kernels.kernels import linear_low_bit as kernel

    out = x.new_empty((*x.shape[:-1], qweight.shape[0]))
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    kernel.linear_low_bit(rows, qweight, scales, zeros, perm, out)
    return out


def _facts(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    perm: Tensor | None,
) -> Facts:
    return (
        ("rows", x.numel() // max(1, x.shape[-1])),
        ("bits", bits),
        ("group_size", LowBit(qweight, scales).group_size),
        ("word_alignment", word_alignment(qweight)),
        *cuda_facts(x, LowBit(qweight, scales)),
    )


_linear_low_bit = define(
    "linear_low_bit",
    "Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, int bits, int? group_size,"
    " Tensor? perm",
    "Tensor",
    fake=lambda x, qweight, *_: x.new_empty((*x.shape[:-1], qweight.shape[0])),
    cells={
        "reference": linear_low_bit_reference,
        "triton": Cell(_linear_low_bit_triton, refuses=triton_refuses),
        "cuda": Cell(
            _linear_low_bit_cuda,
            dtypes=(torch.bfloat16, torch.float16),
            refuses=_cuda_refuses,
            asks_each_call=True,
        ),
    },
    facts=_facts,
)


def linear_low_bit(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None,
    perm: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x times a low-bit weight transposed.

    Args:
        x: (..., in), float32, bfloat16 or float16 (float64 on the reference); at least 2-D.
        qweight: (out, in / 2) uint8 for 4 bits; (out, in) int8 or float8_e4m3fn for 8.
        scales: (out, in / group_size), float32, bfloat16 or float16.
        zeros: (out, in / group_size), qweight's dtype; None: codes are symmetric. Never for fp8.
        bits: 4 or 8.
        group_size: weights of a row that share a scale, a multiple of 16 that divides `in`; None:
            the whole row.
        perm: (in,), int32, a permutation; column i of the codes belongs to x[..., perm[i]]. None:
            columns are in order.
        backend: "auto" or a backend's name.

    Returns:
        (..., out), x's dtype; products are added in fp32 and rounded once.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: the layout of compressed-tensors' pack-quantized format, see `ops.low_bit`.
    """
    check = Arguments("linear_low_bit")
    check.tensor("x", x, ("...", "tokens", "in"))
    weight = LowBit(qweight, scales, zeros, perm)
    check_low_bit(check, "", weight, ("out", "in"), bits, group_size)
    check.backend(backend)
    return _linear_low_bit(x, qweight, scales, zeros, bits, group_size, perm, backend)
