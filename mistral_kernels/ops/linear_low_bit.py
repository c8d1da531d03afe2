"""Matrix product with a low-bit weight stored as (out, in): y = x dequantise(weight)^T.

The layout of the weight is that of `mistral_kernels.ops.low_bit`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from mistral_kernels.ops.checks import Arguments, compute_dtype
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    Facts,
    cpu_queue,
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

BLOCK_BYTES = 8 << 20  # of dequantised rows at a time: they stay in the caches until multiplied


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
    """Calls the C++ launcher: raw pointers, sizes, strides, and where to run it."""
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


@functools.cache
def many_rows(dtype: torch.dtype, bits: int) -> tuple[int, torch.dtype]:
    """From how many rows of x on our CPU kernel leaves the product to torch's GEMM, and the dtype
    in which that is fast.

    Time of GEMM over ours, weight (3584, 1024), one thread of a Xeon (Cascade Lake), torch 2.13,
    2026-11-22: int4 g128 1.3 to 1.5 at 64 rows, 1.0 at 128, 0.7 at 512; int8 1.4 to 1.6, 1.1 to
    1.2, 0.7. With bf16 instructions, of which torch's bf16 makes more than ours (EPYC, Zen 5,
    2026-11-23): int4 g128 1.8 at 16 rows, 1.2 at 32, 1.0 at 48, 0.9 at 64; int8 1.0 to 1.2 at 16,
    0.8 at 32; fp8 1.3 and 0.9.
    """
    bf16_instructions = "avx512_bf16" in native_extension().instruction_sets()
    if dtype == torch.bfloat16 and bf16_instructions:
        return 48 if bits == 4 else 17, torch.bfloat16
    return 128, torch.float32


def multiply_dequantised(rows: Tensor, weight: LowBit, out: Tensor) -> Tensor:
    """out = rows dequantise(weight)^T by torch's GEMM, a block of the weight at a time.

    Args:
        rows: (rows, in), float32, bfloat16 or float16.
        weight: (out, in) in the layout.
        out: (rows, out), rows' dtype.
    """
    out_dim, in_dim = weight.shape
    if weight.perm is not None:
        rows = rows.index_select(1, weight.perm)
    step = max(1, BLOCK_BYTES // (max(1, in_dim) * rows.element_size()))
    block = rows.new_empty(min(step, out_dim), in_dim)
    for first in range(0, out_dim, step):
        lines = slice(first, min(first + step, out_dim))
        part = weight.part(lines)  # perm has been seen to
        dense = block[: len(part.qweight)]
        native_extension().dequantise_cpu(
            launch_fields(part),
            dense.data_ptr(),
            *dense.shape,
            KERNEL_DTYPES.index(dense.dtype),
            *cpu_queue(),
        )
        torch.mm(rows, dense.mT, out=out[:, lines])
    return out


def _linear_low_bit_cpu(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    perm: Tensor | None,
) -> Tensor:
    weight = LowBit(qweight, scales, zeros, perm)
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    many, dtype = many_rows(x.dtype, bits)
    if len(rows) >= many:
        out = x.new_empty(len(rows), len(qweight), dtype=dtype)
        multiply_dequantised(rows.to(dtype), weight, out)
        return out.to(x.dtype).view(*x.shape[:-1], len(qweight))
    out = x.new_empty((*x.shape[:-1], len(qweight)))
    _launch(native_extension().linear_low_bit_cpu, rows, weight, out, *cpu_queue())
    return out


_linear_low_bit = define(
    "linear_low_bit",
    "Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, int bits, int? group_size,"
    " Tensor? perm",
    "Tensor",
    fake=lambda x, qweight, *_: x.new_empty((*x.shape[:-1], qweight.shape[0])),
    cells={
        "reference": linear_low_bit_reference,
        "cpu": Cell(_linear_low_bit_cpu),
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
