"""SwiGLU's elementwise half: silu(gate) * up, with silu(a) = a / (1 + exp(-a)).

Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.checks import Arguments, compute_dtype
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    cpu_queue,
    cuda_queue,
    define,
    native_extension,
)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    # contiguous, so that strides do not change the bits
    gate, up = gate_up.to(compute_dtype(gate_up.dtype)).contiguous().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def silu_mul_backward(grads: list[Tensor], needs: list[bool], gate_up: Tensor):
    gate, up = gate_up.to(compute_dtype(gate_up.dtype)).chunk(2, -1)
    grad = grads[0].to(gate.dtype)
    sigmoid = torch.sigmoid(gate)
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return (torch.cat((d_gate, grad * gate * sigmoid), -1),)


def _empty_output(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _as_rows(x: Tensor) -> Tensor:
    """(..., columns) as (tokens, columns), a view wherever the strides allow it."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _silu_mul_native(launch, gate_up: Tensor, *queue) -> Tensor:
    """Calls the C++ or CUDA launcher: raw pointers, sizes, a stride, and where to run it."""
    rows = _as_rows(gate_up)
    tokens, columns = rows.shape
    out = _empty_output(gate_up)
    launch(
        rows.data_ptr(),
        out.data_ptr(),
        tokens,
        columns // 2,
        rows.stride(0),
        KERNEL_DTYPES.index(rows.dtype),
        *queue,
    )
    return out


def _silu_mul_cpu(gate_up: Tensor) -> Tensor:
    return _silu_mul_native(native_extension().silu_mul_cpu, gate_up, *cpu_queue())


def _silu_mul_cuda(gate_up: Tensor) -> Tensor:
    launch = native_extension().silu_mul_cuda
    return _silu_mul_native(launch, gate_up, *cuda_queue(gate_up.device))


def _silu_mul_triton(gate_up: Tensor) -> Tensor:
    from mistral_kernels.kernels import silu_mul as kernel

    out = _empty_output(gate_up)
    kernel.silu_mul(_as_rows(gate_up), _as_rows(out))
    return out


def _silu_mul_backward_triton(grads: list[Tensor], needs, gate_up: Tensor) -> tuple[Tensor]:
    from mistral_kernels.kernels import silu_mul as kernel

    d_gate_up = gate_up.new_empty(gate_up.shape)
    grad = grads[0].contiguous()  # autograd hands over expanded scalars too
    kernel.silu_mul_backward(_as_rows(grad), _as_rows(gate_up), _as_rows(d_gate_up))
    return (d_gate_up,)


_silu_mul = define(
    "silu_mul",
    "Tensor gate_up",
    "Tensor",
    fake=_empty_output,
    cells={
        "reference": silu_mul_reference,
        "cpu": Cell(_silu_mul_cpu),
        "triton": Cell(_silu_mul_triton),
        "cuda": Cell(_silu_mul_cuda),
    },
    differentiable=("gate_up",),
    backward={"reference": silu_mul_backward, "triton": Cell(_silu_mul_backward_triton)},
)


def silu_mul(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up, computed in fp32 and rounded once.

    Args:
        gate_up: (..., 2 * ffn_dim), gate first; float32, bfloat16 or float16 (float64 on the
            reference).
        backend: "auto" or a backend's name.

    Returns:
        (..., ffn_dim), contiguous, gate_up's dtype.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: Shazeer 2020, arXiv 2002.05202.
    """
    check = Arguments("silu_mul")
    check.tensor("gate_up", gate_up, ("...", "2 * ffn_dim"))
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"silu_mul: gate_up must have an even last dimension, got {tuple(gate_up.shape)}"
        )
    check.backend(backend)
    return _silu_mul(gate_up, backend)
