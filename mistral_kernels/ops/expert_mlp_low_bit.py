"""`expert_mlp` on low-bit weights: each expert's codes are read once, whoever chose it.

    out = sum_slot weights[slot] * w2[e] (silu(w1[e] x) * w3[e] x),   e = expert_ids[slot]

with every w = (code - zero) * scale in the layout of `mistral_kernels.ops.low_bit`, one weight of
that layout an expert. w13 holds w1 (gate) rows first, then w3 (up) rows. Slots are skipped as in
`expert_mlp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.checks import Arguments, compute_dtype
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    Facts,
    address,
    cpu_queue,
    cuda_queue,
    define,
    native_extension,
)
from mistral_kernels.ops.expert_mlp import (
    MAX_PAIRS,
    chunks,
    cpu_refuses,
    expert_mlp_reference,
    gemm_bytes,
    sorted_by_expert,
)
from mistral_kernels.ops.linear_low_bit import many_rows, multiply_dequantised
from mistral_kernels.ops.low_bit import (
    LowBit,
    check_bits,
    check_low_bit,
    cuda_facts,
    cuda_refuses,
    launch_fields,
    triton_refuses,
    word_alignment,
)


def expert_mlp_low_bit_reference(
    x: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    w2: Tensor,
    w2_scales: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w13_zeros: Tensor | None,
    w2_zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    w13_perm: Tensor | None,
    w2_perm: Tensor | None,
) -> Tensor:
    dtype = compute_dtype(x.dtype)
    up = LowBit(w13, w13_scales, w13_zeros, w13_perm).dequantise(dtype)
    down = LowBit(w2, w2_scales, w2_zeros, w2_perm).dequantise(dtype)
    return expert_mlp_reference(x.to(dtype), up, down, weights, expert_ids, False).to(x.dtype)


def _launch(
    launch, x: Tensor, up: LowBit, down: LowBit, weights, expert_ids, out, inner, *queue
) -> None:
    """Calls the C++ launcher: raw pointers, sizes, strides, and where to run it."""
    launch(
        x.data_ptr(),
        launch_fields(up),
        launch_fields(down),
        weights.data_ptr(),
        expert_ids.data_ptr(),
        out.data_ptr(),
        *x.shape,
        down.shape[2],
        len(down.qweight),
        weights.shape[1],
        x.stride(0),
        weights.stride(0),
        expert_ids.stride(0),
        KERNEL_DTYPES.index(x.dtype),
        address(inner),
        *queue,
    )


def _expert_mlp_low_bit_cuda(
    x: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    w2: Tensor,
    w2_scales: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w13_zeros: Tensor | None,
    w2_zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    w13_perm: Tensor | None,
    w2_perm: Tensor | None,
) -> Tensor:
    up = LowBit(w13, w13_scales, w13_zeros, w13_perm)
    down = LowBit(w2, w2_scales, w2_zeros, w2_perm)
    out = x.new_empty(x.shape)
    inner = x.new_empty(expert_ids.numel(), down.shape[2])
    launch = native_extension().expert_mlp_low_bit_cuda
    _launch(launch, x, up, down, weights, expert_ids, out, inner, *cuda_queue(x.device))
    return out


def _cuda_refuses(facts: dict[str, int]) -> str | None:
    tokens, top_k = facts.get("tokens", 1), facts.get("top_k", 1)
    if tokens * top_k > MAX_PAIRS:
        return f"it takes tokens * top_k up to {MAX_PAIRS}, got {tokens} * {top_k}"
    return cuda_refuses("tokens", facts)


def _expert_mlp_low_bit_triton(
    x: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    w2: Tensor,
    w2_scales: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w13_zeros: Tensor | None,
    w2_zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    w13_perm: Tensor | None,
    w2_perm: Tensor | None,
) -> Tensor:
    from mistral_kernels.kernels import expert_mlp_low_bit as kernel

    up, down = (w13, w13_scales, w13_zeros, w13_perm), (w2, w2_scales, w2_zeros, w2_perm)
    out = x.new_empty(x.shape)
    bytes_a_token = kernel.bytes_a_token(weights.shape[1], *LowBit(*down).shape[1:], x.dtype)
    for rows in chunks(len(x), bytes_a_token):
        call = x[rows], up, down, weights[rows], expert_ids[rows], out[rows]
        kernel.expert_mlp_low_bit(*call)
    return out


def _facts(
    x: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    w2: Tensor,
    w2_scales: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w13_zeros: Tensor | None,
    w2_zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    w13_perm: Tensor | None,
    w2_perm: Tensor | None,
) -> Facts:
    return (
        ("tokens", len(x)),
        ("experts", len(w13)),
        ("top_k", weights.shape[1]),
        ("bits", bits),
        ("group_size", LowBit(w13, w13_scales).group_size),
        ("w2_group_size", LowBit(w2, w2_scales).group_size),
        ("word_alignment", word_alignment(w13, w2)),
        *cuda_facts(x, LowBit(w13, w13_scales), LowBit(w2, w2_scales)),
    )


def _expert_mlp_low_bit_cpu(
    x: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    w2: Tensor,
    w2_scales: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w13_zeros: Tensor | None,
    w2_zeros: Tensor | None,
    bits: int,
    group_size: int | None,
    w13_perm: Tensor | None,
    w2_perm: Tensor | None,
) -> Tensor:
    up = LowBit(w13, w13_scales, w13_zeros, w13_perm)
    down = LowBit(w2, w2_scales, w2_zeros, w2_perm)
    ffn_dim = down.shape[-1]
    out = x.new_empty(x.shape)
    many, dtype = many_rows(x.dtype, bits)
    if expert_ids.numel() >= many * len(w13):  # on average an expert has many rows
        stacked = {"w13": up, "w2": down}

        def project(name: str, expert: int, rows: Tensor, out: Tensor) -> None:
            multiply_dequantised(rows, stacked[name].part(expert), out)

        for rows in chunks(len(x), gemm_bytes(x, ffn_dim, expert_ids)):
            call = len(w13), ffn_dim, weights[rows], expert_ids[rows], project
            out[rows] = sorted_by_expert(x[rows].to(dtype), *call).to(x.dtype)
        return out
    launch = native_extension().expert_mlp_low_bit_cpu
    _launch(launch, x, up, down, weights, expert_ids, out, None, *cpu_queue())
    return out


_expert_mlp_low_bit = define(
    "expert_mlp_low_bit",
    "Tensor x, Tensor w13, Tensor w13_scales, Tensor w2, Tensor w2_scales, Tensor weights,"
    " Tensor expert_ids, Tensor? w13_zeros, Tensor? w2_zeros, int bits, int? group_size,"
    " Tensor? w13_perm, Tensor? w2_perm",
    "Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    cells={
        "reference": Cell(expert_mlp_low_bit_reference, waits=True),
        "cpu": Cell(_expert_mlp_low_bit_cpu, refuses=cpu_refuses),
        "triton": Cell(_expert_mlp_low_bit_triton, refuses=triton_refuses),
        "cuda": Cell(
            _expert_mlp_low_bit_cuda,
            dtypes=(torch.bfloat16, torch.float16),
            refuses=_cuda_refuses,
            asks_each_call=True,
        ),
    },
    facts=_facts,
)


def expert_mlp_low_bit(
    x: Tensor,
    w13: Tensor,
    w13_scales: Tensor,
    w2: Tensor,
    w2_scales: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w13_zeros: Tensor | None = None,
    w2_zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None,
    w13_perm: Tensor | None = None,
    w2_perm: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dispatches tokens to their low-bit experts, runs the SwiGLU networks, combines the slots.

    Args:
        x: (tokens, hidden), float32, bfloat16 or float16 (float64 on the reference).
        w13: (experts, 2 * ffn_dim, hidden / 2) uint8 for 4 bits, gate rows first;
            (experts, 2 * ffn_dim, hidden) int8 or float8_e4m3fn for 8.
        w13_scales: (experts, 2 * ffn_dim, hidden / group_size), float32, bfloat16 or float16.
        w2: (experts, hidden, ffn_dim / 2) or (experts, hidden, ffn_dim), w13's dtype.
        w2_scales: (experts, hidden, ffn_dim / group_size), w13_scales' dtype.
        weights: (tokens, top_k), float32 (or float64 for float64 x), of `route_experts`.
        expert_ids: (tokens, top_k), int32; an id < 0 or >= experts skips the slot.
        w13_zeros, w2_zeros: shape of their scales, dtype of their codes; None: symmetric codes.
        bits: 4 or 8.
        group_size: weights of a row that share a scale, a multiple of 16 that divides hidden and
            ffn_dim; None: the whole row.
        w13_perm: (experts, hidden), int32: column i of the codes belongs to x[..., perm[i]].
        w2_perm: (experts, ffn_dim), the same for what lies between the projections.
        backend: "auto" or a backend's name.

    Returns:
        (tokens, hidden), x's dtype; slots are added in order in fp32 and rounded once.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: Jiang et al. 2024, arXiv 2401.04088, section 2.1; the layout as in `ops.low_bit`.
    """
    check = Arguments("expert_mlp_low_bit")
    check.tensor("x", x, ("tokens", "hidden"))
    check.is_tensor("w2", w2)
    up = LowBit(w13, w13_scales, w13_zeros, w13_perm)
    down = LowBit(w2, w2_scales, w2_zeros, w2_perm)
    check_bits(check, bits)
    ffn_dim = w2.shape[-1] * 8 // bits if w2.dim() else 0
    check_low_bit(check, "w2", down, ("experts", "hidden", ffn_dim), bits, group_size)
    check_low_bit(check, "w13", up, ("experts", 2 * ffn_dim, "hidden"), bits, group_size)
    for name, value, like in (("w13", w13, w2), ("w13_scales", w13_scales, w2_scales)):
        if value.dtype != like.dtype:
            raise TypeError(
                f"{check.op}: {name} must be {like.dtype} as its w2's, got {value.dtype}"
            )
    check.tensor("weights", weights, ("tokens", "top_k"), (compute_dtype(x.dtype),))
    check.integer("weights.shape[1] (top_k)", weights.shape[1], 1)
    check.tensor("expert_ids", expert_ids, ("tokens", "top_k"), (torch.int32,))
    check.backend(backend)
    return _expert_mlp_low_bit(
        x,
        w13,
        w13_scales,
        w2,
        w2_scales,
        weights,
        expert_ids,
        w13_zeros,
        w2_zeros,
        bits,
        group_size,
        w13_perm,
        w2_perm,
        backend,
    )
