"""The mixture of experts: each token's k chosen feed-forward networks, weighted and summed.

    out = sum_slot weights[slot] * w2[e] (silu(w1[e] x) * w3[e] x),   e = expert_ids[slot]

w13 holds w1 (gate) rows first, then w3 (up) rows. No token is dropped; a slot whose id is outside
[0, experts) is skipped: it reads no weights and adds nothing. Three tokens, top-2 of three experts;
each expert works on the (token, slot) pairs that chose it:

>>> expert_ids = torch.tensor([[0, 2], [2, 1], [0, -1]])
>>> for expert in range(3):
...     print(torch.stack(pairs_of(expert_ids, expert), 1).tolist())
[[0, 0], [2, 0]]
[[1, 1]]
[[0, 1], [1, 0]]

Source: Jiang et al. 2024, arXiv 2401.04088; Shazeer 2020 for SwiGLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mistral_kernels.ops.checks import Arguments, compute_dtype
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    VECTOR_BYTES,
    Cell,
    Facts,
    address,
    cpu_queue,
    cuda_queue,
    define,
    native_extension,
)
from mistral_kernels.ops.linear import few_rows, linear_reference
from mistral_kernels.ops.silu_mul import silu_mul, silu_mul_backward, silu_mul_reference

WORKSPACE_BYTES = 256 << 20  # many tokens are worked in chunks that need no more than this
MAX_TOP_K = 256  # kMaxPairs of csrc/cpu/expert_loop.h
MAX_TOKENS = 16  # kMaxTokens of csrc/cuda/expert_mlp.cu
MAX_PAIRS = 64  # kMaxPairs of csrc/cuda/expert_mlp.cu


def pairs_of(expert_ids: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Tokens and slots of the pairs that chose `expert`, in token order."""
    return (expert_ids == expert).nonzero(as_tuple=True)


def chunks(tokens: int, bytes_a_token: int) -> Iterator[slice]:
    """Ranges of tokens that WORKSPACE_BYTES are enough for, as even as can be."""
    count = -(-tokens // max(1, WORKSPACE_BYTES // bytes_a_token))
    size = -(-tokens // max(1, count))
    return (slice(begin, begin + size) for begin in range(0, tokens, max(1, size)))


def gemm_bytes(x: Tensor, ffn_dim: int, expert_ids: Tensor) -> int:
    """Workspace of a token where torch's GEMMs do the work, at most."""
    return expert_ids.shape[1] * (3 * ffn_dim + 3 * x.shape[1]) * 4


def expert_mlp_reference(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    batch_invariant: bool,
) -> Tensor:
    out = x.new_empty(x.shape)
    for rows in chunks(len(x), gemm_bytes(x, w2.shape[2], expert_ids)):
        ids = expert_ids[rows]
        slots = x.new_zeros(*ids.shape, x.shape[1], dtype=compute_dtype(x.dtype))
        for expert in range(len(w13)):
            tokens, slot = pairs_of(ids, expert)
            if len(tokens):
                gate_up = linear_reference(x[rows][tokens], w13[expert], batch_invariant)
                hidden = silu_mul_reference(gate_up)
                slots[tokens, slot] = linear_reference(hidden, w2[expert], batch_invariant).to(
                    slots.dtype
                )
        used = (ids >= 0) & (ids < len(w13))
        weighted = slots * torch.where(used, weights[rows], 0).to(slots.dtype)[..., None]
        total = weighted[:, 0]
        for slot in range(1, ids.shape[1]):  # fixed order: the same bits every time
            total = total + weighted[:, slot]
        out[rows] = total.to(x.dtype)
    return out


def expert_mlp_backward(
    grads: list[Tensor], needs: list[bool], x, w13, w2, weights, expert_ids, batch_invariant
):
    dtype = compute_dtype(x.dtype)
    grad, value = grads[0].to(dtype), x.to(dtype)
    d_x, d_w13, d_w2, d_weights = (
        torch.zeros_like(t, dtype=dtype) if needed else None
        for t, needed in zip((x, w13, w2, weights), needs, strict=True)
    )
    for expert in range(len(w13)):
        tokens, slot = pairs_of(expert_ids, expert)
        up_weight, down_weight = w13[expert].to(dtype), w2[expert].to(dtype)
        gate_up = value[tokens] @ up_weight.mT
        hidden = silu_mul_reference(gate_up)
        if d_weights is not None:
            d_weights[tokens, slot] = (grad[tokens] * (hidden @ down_weight.mT)).sum(-1)
        d_slot = grad[tokens] * weights[tokens, slot].to(dtype)[:, None]
        if d_w2 is not None:
            d_w2[expert] = d_slot.mT @ hidden
        (d_gate_up,) = silu_mul_backward([d_slot @ down_weight], [True], gate_up)
        if d_w13 is not None:
            d_w13[expert] = d_gate_up.mT @ value[tokens]
        if d_x is not None:
            d_x.index_add_(0, tokens, d_gate_up @ up_weight)
    return d_x, d_w13, d_w2, d_weights


def sorted_by_expert(
    x: Tensor,
    experts: int,
    ffn_dim: int,
    weights: Tensor,
    expert_ids: Tensor,
    project: Callable[[str, int, Tensor, Tensor], None],
) -> Tensor:
    """Many tokens on the CPU: each used expert's pairs side by side, one GEMM a projection.

    Args:
        x: (tokens, hidden).
        experts, ffn_dim: sizes of the weights.
        weights, expert_ids: as `expert_mlp` takes them.
        project: `(name, expert, rows, out)` writes rows times w13 or w2 (the name) of that expert.

    Returns:
        (tokens, hidden), float32.
    """
    top_k = expert_ids.shape[1]
    used = (expert_ids >= 0) & (expert_ids < experts)
    keys = torch.where(used, expert_ids, experts).flatten()
    order = keys.sort(stable=True).indices
    *counts, skipped = keys.bincount(minlength=experts + 1).tolist()
    # Skipped pairs come last; all of them share one row of zeros behind the others.
    down = x.new_empty(sum(counts) + 1, x.shape[1])
    down[-1] = 0
    rows = x.index_select(0, order[: len(order) - skipped] // top_k)
    gate_up = x.new_empty(max(counts, default=0), 2 * ffn_dim)
    first = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = slice(first, first + count)
            project("w13", expert, rows[pairs], gate_up[:count])
            project("w2", expert, silu_mul(gate_up[:count]), down[pairs])
            first += count
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    places = places.clamp_(max=sum(counts)).view(expert_ids.shape)
    weights = torch.where(used, weights, 0)
    total = down.index_select(0, places[:, 0]).float().mul_(weights[:, :1])
    for slot in range(1, top_k):  # fixed order: the same bits every time
        total.addcmul_(down.index_select(0, places[:, slot]).float(), weights[:, slot, None])
    return total


def _launch(launch, x, w13, w2, weights, expert_ids, out, inner: Tensor | None, *queue) -> None:
    """Calls the C++ or CUDA launcher: raw pointers, sizes, strides, and where to run it."""
    launch(
        x.data_ptr(),
        w13.data_ptr(),
        w2.data_ptr(),
        weights.data_ptr(),
        expert_ids.data_ptr(),
        out.data_ptr(),
        *x.shape,
        w2.shape[2],
        w13.shape[0],
        weights.shape[1],
        x.stride(0),
        *w13.stride()[:2],
        *w2.stride()[:2],
        weights.stride(0),
        expert_ids.stride(0),
        KERNEL_DTYPES.index(x.dtype),
        address(inner),
        *queue,
    )


def _expert_mlp_cpu(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, expert_ids: Tensor, batch_invariant: bool
) -> Tensor:
    out = x.new_empty(x.shape)
    # On average an expert has few rows. Time of the GEMMs over ours, hidden 512, ffn_dim 1792, 8
    # experts, top-2, float32, on the machine of `few_rows`: 2.3 for 1 token, 2.6 for 32, 2.2 for
    # 128, 1.0 for 256.
    if not batch_invariant and expert_ids.numel() > few_rows(x.dtype) * len(w13):
        stacked = {"w13": w13, "w2": w2}

        def project(name: str, expert: int, rows: Tensor, out: Tensor) -> None:
            torch.mm(rows, stacked[name][expert].mT, out=out)

        for rows in chunks(len(x), gemm_bytes(x, w2.shape[2], expert_ids)):
            call = len(w13), w2.shape[2], weights[rows], expert_ids[rows], project
            out[rows] = sorted_by_expert(x[rows], *call)
        return out
    launch = native_extension().expert_mlp_cpu
    _launch(launch, x, w13, w2, weights, expert_ids, out, None, *cpu_queue())
    return out


def cpu_refuses(facts: dict[str, int]) -> str | None:
    top_k = facts.get("top_k", 1)
    return None if top_k <= MAX_TOP_K else f"it takes top_k up to {MAX_TOP_K}, got {top_k}"


def _expert_mlp_triton(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, expert_ids: Tensor, batch_invariant: bool
) -> Tensor:
    from mistral_kernels.kernels import expert_mlp as kernel

    out = x.new_empty(x.shape)
    bytes_a_token = kernel.bytes_a_token(weights.shape[1], *w2.shape[1:], x.dtype)
    for rows in chunks(len(x), bytes_a_token):
        call = x[rows], w13, w2, weights[rows], expert_ids[rows], out[rows]
        kernel.expert_mlp(*call, batch_invariant)
    return out


def _expert_mlp_backward_triton(
    grads: list[Tensor], needs: list[bool], x, w13, w2, weights, expert_ids, batch_invariant
) -> tuple[Tensor | None, ...]:
    from mistral_kernels.kernels import expert_mlp_backward as kernel

    gradients = tuple(
        tensor.new_empty(tensor.shape) if needed else None
        for tensor, needed in zip((x, w13, w2, weights), needs, strict=True)
    )
    grad = grads[0].contiguous()  # autograd may hand over any strides
    call = grad, x, w13, w2, weights, expert_ids, *gradients, batch_invariant
    kernel.expert_mlp_backward(*call, WORKSPACE_BYTES)
    return gradients


def _expert_mlp_cuda(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, expert_ids: Tensor, batch_invariant: bool
) -> Tensor:
    out = x.new_empty(x.shape)
    inner = x.new_empty(expert_ids.numel(), w2.shape[2])
    launch = native_extension().expert_mlp_cuda
    _launch(launch, x, w13, w2, weights, expert_ids, out, inner, *cuda_queue(x.device))
    return out


def _cuda_refuses(facts: dict[str, int]) -> str | None:
    tokens, top_k = facts.get("tokens", 1), facts.get("top_k", 1)
    if facts.get("batch_invariant"):
        return f"its bits are its own and end at {MAX_TOKENS} tokens, got batch_invariant=True"
    if tokens > MAX_TOKENS:
        return f"it takes up to {MAX_TOKENS} tokens, got {tokens}"
    if tokens * top_k > MAX_PAIRS:
        return f"it takes tokens * top_k up to {MAX_PAIRS}, got {tokens} * {top_k}"
    alignment = facts.get("alignment", VECTOR_BYTES)
    if alignment < VECTOR_BYTES:
        return f"it takes rows on {VECTOR_BYTES}-byte boundaries, got {alignment}"
    return None


def _alignment(x: Tensor, w13: Tensor, w2: Tensor) -> int:
    """Bytes, up to VECTOR_BYTES, on whose multiples all rows of the three begin and end."""
    steps = *x.shape[1:], *x.stride()[:1], *w13.stride()[:2], *w2.shape[2:], *w2.stride()[:2]
    addresses = (x.data_ptr(), w13.data_ptr(), w2.data_ptr())
    return math.gcd(VECTOR_BYTES, *addresses, *(step * x.element_size() for step in steps))


def _facts(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, expert_ids: Tensor, batch_invariant: bool
) -> Facts:
    return (
        ("tokens", len(x)),
        ("experts", len(w13)),
        ("hidden", w2.shape[1]),
        ("ffn_dim", w2.shape[2]),
        ("top_k", weights.shape[1]),
        ("batch_invariant", int(batch_invariant)),
        ("alignment", _alignment(x, w13, w2)),
    )


_expert_mlp = define(
    "expert_mlp",
    "Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor expert_ids, bool batch_invariant",
    "Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    cells={
        "reference": Cell(expert_mlp_reference, waits=True),
        "cpu": Cell(_expert_mlp_cpu, refuses=cpu_refuses),
        "triton": Cell(_expert_mlp_triton),
        "cuda": Cell(
            _expert_mlp_cuda,
            dtypes=(torch.bfloat16, torch.float16),
            refuses=_cuda_refuses,
            asks_each_call=True,
        ),
    },
    facts=_facts,
    differentiable=("x", "w13", "w2", "weights"),
    backward={
        "reference": expert_mlp_backward,
        "triton": Cell(_expert_mlp_backward_triton),
    },
)


def expert_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Dispatches tokens to their experts, runs the SwiGLU networks, combines the slots.

    Args:
        x: (tokens, hidden), float32, bfloat16 or float16 (float64 on the reference).
        w13: (experts, 2 * ffn_dim, hidden), gate rows first, x's dtype.
        w2: (experts, hidden, ffn_dim), x's dtype.
        weights: (tokens, top_k), float32 (or float64 for float64 x), of `route_experts`.
        expert_ids: (tokens, top_k), int32; an id < 0 or >= experts skips the slot.
        batch_invariant: a token's bits do not depend on its neighbours.
        backend: "auto" or a backend's name.

    Returns:
        (tokens, hidden), x's dtype; slots are added in order in fp32 and rounded once.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.

    Source: Jiang et al. 2024, arXiv 2401.04088, section 2.1.
    """
    check = Arguments("expert_mlp")
    check.tensor("x", x, ("tokens", "hidden"))
    check.tensor("w2", w2, ("experts", "hidden", "ffn_dim"), (x.dtype,))
    check.tensor("w13", w13, ("experts", 2 * w2.shape[2], "hidden"), (x.dtype,))
    check.integer("w2.shape[1] (hidden)", w2.shape[1], 1)
    check.tensor("weights", weights, ("tokens", "top_k"), (compute_dtype(x.dtype),))
    check.integer("weights.shape[1] (top_k)", weights.shape[1], 1)
    check.tensor("expert_ids", expert_ids, ("tokens", "top_k"), (torch.int32,))
    check.flag("batch_invariant", batch_invariant)
    check.backend(backend)
    return _expert_mlp(x, w13, w2, weights, expert_ids, batch_invariant, backend)
