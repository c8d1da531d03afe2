"""Rotary position embedding: each pair (a, b) of a head turns by the angle position * frequency.

    (a, b) -> (a cos - b sin, b cos + a sin)

Two layouts of the pairs: interleaved (x0,x1)(x2,x3).. as in Mistral's own checkpoints, and
half-split (x0,x[d/2])(x1,x[d/2+1]).. as in Hugging Face's. `q_scale` multiplies q afterwards.

Source: Su et al. 2021, arXiv 2104.09864; q_scale: Llama 4's attention temperature.
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


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    q_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    idle = (positions < 0)[:, None, None]
    rows = positions.clamp(min=0)
    cos, sin = cos[rows][:, None], sin[rows][:, None]

    def rotate(x: Tensor, scale: Tensor | None = None) -> Tensor:
        value = x.to(compute_dtype(x.dtype))
        a, b = (value[..., 0::2], value[..., 1::2]) if interleaved else value.chunk(2, -1)
        turned = a * cos - b * sin, b * cos + a * sin
        value = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        value = value if scale is None else value * scale[rows][:, None, None]
        return torch.where(idle, x, value.to(x.dtype)).contiguous()

    return rotate(q, q_scale), rotate(k)


def _rope_in_place(q, k, cos, sin, positions, interleaved, q_scale) -> None:
    rotated_q, rotated_k = rope_reference(q, k, cos, sin, positions, interleaved, q_scale)
    q.copy_(rotated_q)
    k.copy_(rotated_k)


def _heads(x: Tensor, out: Tensor) -> tuple[int, ...]:
    """What the C++ struct RopeHeads holds."""
    _, heads, _ = x.shape
    stride_token, stride_head, _ = x.stride()
    stride_out_token, stride_out_head, _ = out.stride()
    return (
        x.data_ptr(), out.data_ptr(), heads,
        stride_token, stride_head, stride_out_token, stride_out_head,
    )  # fmt: skip


def _rotate(launch, q, k, cos, sin, positions, interleaved, q_scale, *queue, out_q, out_k) -> None:
    """Calls the C++ or CUDA launcher: q and k as RopeHeads, the tables, sizes, where to run it."""
    tokens, _, head_dim = q.shape
    launch(
        _heads(q, out_q),
        _heads(k, out_k),
        cos.data_ptr(),
        sin.data_ptr(),
        address(q_scale),
        positions.data_ptr(),
        tokens,
        head_dim,
        cos.stride(0),
        sin.stride(0),
        interleaved,
        KERNEL_DTYPES.index(q.dtype),
        *queue,
    )


def _rope_native(launch, q, k, *rest) -> tuple[Tensor, Tensor]:
    out_q, out_k = q.new_empty(*q.shape), k.new_empty(*k.shape)
    _rotate(launch, q, k, *rest, out_q=out_q, out_k=out_k)
    return out_q, out_k


def _rope_in_place_native(launch, q, k, *rest) -> None:
    _rotate(launch, q, k, *rest, out_q=q, out_k=k)


def _rope_cpu(*inputs) -> tuple[Tensor, Tensor]:
    return _rope_native(native_extension().rope_cpu, *inputs, *cpu_queue())


def _rope_in_place_cpu(*inputs) -> None:
    _rope_in_place_native(native_extension().rope_cpu, *inputs, *cpu_queue())


def _rope_cuda(q, *rest) -> tuple[Tensor, Tensor]:
    return _rope_native(native_extension().rope_cuda, q, *rest, *cuda_queue(q.device))


def _rope_in_place_cuda(q, *rest) -> None:
    _rope_in_place_native(native_extension().rope_cuda, q, *rest, *cuda_queue(q.device))


def _rotate_triton(q, k, *rest, **how) -> None:
    from mistral_kernels.kernels import rope as kernel

    kernel.rope(q, k, *rest, **how)


def _rope_triton(q, k, *rest, inverse: bool = False) -> tuple[Tensor, Tensor]:
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    _rotate_triton(q, k, *rest, out_q=out_q, out_k=out_k, inverse=inverse)
    return out_q, out_k


def _rope_in_place_triton(q, k, *rest) -> None:
    _rotate_triton(q, k, *rest, out_q=q, out_k=k)


def rope_backward(grads: list[Tensor], needs, q, k, cos, sin, positions, interleaved, q_scale):
    # A rotation's transpose is the rotation by the opposite angle.
    return rope_reference(grads[0], grads[1], cos, -sin, positions, interleaved, q_scale)


def _rope_backward_triton(grads: list[Tensor], needs, q, k, *rest) -> tuple[Tensor, Tensor]:
    d_q, d_k = (grad.contiguous() for grad in grads)  # autograd hands over expanded scalars too
    return _rope_triton(d_q, d_k, *rest, inverse=True)


def check_rope_positions(op: str, positions: Tensor, table: Tensor) -> None:
    """Refuses positions that the cos/sin tables do not reach (reads data: CPU tensors only)."""
    few = len(positions) <= 64  # there a list is faster than torch's 5 us
    largest = max(positions.tolist(), default=0) if few else int(positions.max())
    if largest >= table.shape[0]:
        raise ValueError(
            f"{op}: positions must be < {table.shape[0]} (the rows of cos), got {largest}"
        )


def _check_values(op: str):
    return lambda q, k, cos, sin, positions, *_: check_rope_positions(op, positions, cos)


_ARGUMENTS = "Tensor cos, Tensor sin, Tensor positions, bool interleaved, Tensor? q_scale"

_rope = define(
    "rope",
    f"Tensor q, Tensor k, {_ARGUMENTS}",
    "(Tensor, Tensor)",
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    cells={
        "reference": rope_reference,
        "cpu": Cell(_rope_cpu),
        "triton": Cell(_rope_triton),
        "cuda": Cell(_rope_cuda),
    },
    check_values=_check_values("rope"),
    differentiable=("q", "k"),
    backward={"reference": rope_backward, "triton": Cell(_rope_backward_triton)},
)

_rope_ = define(
    "rope_",
    f"Tensor(a!) q, Tensor(b!) k, {_ARGUMENTS}",
    "()",
    fake=lambda *_: None,
    cells={
        "reference": _rope_in_place,
        "cpu": Cell(_rope_in_place_cpu),
        "triton": Cell(_rope_in_place_triton),
        "cuda": Cell(_rope_in_place_cuda),
    },
    check_values=_check_values("rope_"),
)


def check_rope_tables(
    check: Arguments, cos: Tensor, sin: Tensor, q_scale: Tensor | None, q: Tensor
) -> None:
    """Checks the rotary tables that rope and decode_attention share."""
    table_dtype = (compute_dtype(q.dtype),)
    check.tensor("cos", cos, ("max_positions", "head_dim / 2"), table_dtype)
    if 2 * cos.shape[1] != q.shape[-1]:
        raise ValueError(
            f"{check.op}: cos must have a column for each pair of head_dim={q.shape[-1]},"
            f" got {cos.shape[1]} columns (for head_dim={2 * cos.shape[1]})"
        )
    check.tensor("sin", sin, ("max_positions", "head_dim / 2"), table_dtype)
    check.integer("cos.shape[0] (max_positions)", cos.shape[0], 1)
    if q_scale is not None:
        check.tensor("q_scale", q_scale, ("max_positions",), table_dtype)


def _check(op, q, k, cos, sin, positions, interleaved, q_scale, backend) -> Arguments:
    check = Arguments(op)
    check.tensor("q", q, ("tokens", "q_heads", "head_dim"))
    check.tensor("k", k, ("tokens", "kv_heads", "head_dim"), (q.dtype,))
    check_rope_tables(check, cos, sin, q_scale, q)
    check.tensor("positions", positions, ("tokens",), (torch.int32,))
    check.flag("interleaved", interleaved)
    check.backend(backend)
    return check


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool,
    q_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotates q and k out of place (differentiable); see `rope_` for the form without a copy.

    Args:
        q: (tokens, q_heads, head_dim), float32, bfloat16 or float16 (float64 on the reference).
        k: (tokens, kv_heads, head_dim), q's dtype.
        cos, sin: (max_positions, head_dim / 2), float32 (float64 for float64 q).
        positions: (tokens,), int32, < max_positions; rows with a negative one stay as they are.
        interleaved: True for pairs (0,1)(2,3).. (Mistral native), False for half-split (Hugging
            Face).
        q_scale: (max_positions,), cos's dtype, multiplies q after the rotation; None for 1.
        backend: "auto" or a backend's name.

    Returns:
        q, k rotated: same shapes and dtypes, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    _check("rope", q, k, cos, sin, positions, interleaved, q_scale, backend)
    return _rope(q, k, cos, sin, positions, interleaved, q_scale, backend)


def rope_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool,
    q_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotates q and k in place; views of one qkv tensor are fine.

    Args:
        q: (tokens, q_heads, head_dim), float32, bfloat16 or float16 (float64 on the reference).
        k: (tokens, kv_heads, head_dim), q's dtype.
        cos, sin: (max_positions, head_dim / 2), float32 (float64 for float64 q).
        positions: (tokens,), int32, < max_positions; rows with a negative one stay as they are.
        interleaved: layout of the pairs, see `rope`.
        q_scale: (max_positions,), cos's dtype, multiplies q after the rotation; None for 1.
        backend: "auto" or a backend's name.

    Returns:
        q, k: the same tensors.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
        RuntimeError: an input requires grad.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    check = _check("rope_", q, k, cos, sin, positions, interleaved, q_scale, backend)
    check.written("q", q)
    check.written("k", k)
    _rope_(q, k, cos, sin, positions, interleaved, q_scale, backend)
    return q, k
