"""softmax(q k^T * scale) v over the keys a window lets a query see: the maths of both attentions.

Key j is visible to query i iff i - window < j <= i. A window of 3 over five tokens (rows: queries):

>>> visible_keys(torch.arange(5), torch.arange(5), window=3, causal=True).int().tolist()
[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.checks import compute_dtype


def visible_keys(
    q_positions: Tensor, k_positions: Tensor, *, window: int | None, causal: bool
) -> Tensor:
    """(queries, keys) bool."""
    if not causal:
        return q_positions.new_ones(len(q_positions), len(k_positions), dtype=torch.bool)
    distance = q_positions[:, None] - k_positions[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def empty_outputs(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Uninitialised out (rows, q_heads, head_dim) in q's dtype and lse (rows, q_heads) float32."""
    rows, q_heads, head_dim = q.shape  # torch reads plain ints faster than a Size
    return q.new_empty(rows, q_heads, head_dim), q.new_empty(rows, q_heads, dtype=torch.float32)


def triton_refuses(facts: dict[str, int], most: int = 64) -> str | None:
    """Why Triton's kernels for groups up to `most` do not take such heads, or None."""
    from mistral_kernels.kernels.attention_tiles import MAX_HEAD_DIM, max_group

    group, head_dim = facts.get("group", 1), facts.get("head_dim", 1)
    if head_dim > MAX_HEAD_DIM:
        return f"it takes head_dim up to {MAX_HEAD_DIM}, got {head_dim}"
    if group > (largest := min(most, max_group(head_dim))):
        return f"it takes group up to {largest} at head_dim {head_dim}, got {group}"
    return None


def attention_probabilities(
    q: Tensor, k: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights (kv_heads, group, queries, keys) and natural-log sums (kv_heads, group, queries).

    q is (queries, kv_heads, group, head_dim), k (keys, kv_heads, head_dim), both in compute dtype.
    A query that sees nothing gets weights 0 and a log sum of -inf.
    """
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    largest = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(1)
    # Where nothing is visible -inf - -inf would be NaN; subtracting 0 leaves exp(-inf) = 0.
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    lse = (largest + total.log()).squeeze(-1)
    return weights / total.masked_fill(total == 0, 1), lse


def weighted_values(weights: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Sums weights * v over the keys each query sees: (queries, kv_heads, group, head_dim).

    A masked value is left out, not multiplied by its weight 0: 0 * NaN would be NaN. So values that
    are not finite are taken out of the product and added only where they are visible.
    """
    if v.sum().isfinite():  # the sum carries any NaN or inf; all is well
        return torch.einsum("hgqk,khd->qhgd", weights, v)
    finite = v.isfinite()
    out = torch.einsum("hgqk,khd->qhgd", weights, v.where(finite, 0))
    odd = (~finite).flatten(1).any(1).nonzero().squeeze(-1)
    terms = torch.einsum("hgqk,khd->qkhgd", weights[..., odd], v[odd].masked_fill(finite[odd], 0))
    return out + terms.where(visible[:, odd, None, None, None], 0).sum(1)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q (queries, q_heads, head_dim), k and v (keys, kv_heads, head_dim), visible (queries, keys).

    Returns out (queries, q_heads, head_dim) in q's dtype and lse (queries, q_heads) float32.
    """
    queries, q_heads, head_dim = q.shape
    dtype = compute_dtype(q.dtype)
    grouped = q.to(dtype).view(queries, k.shape[1], -1, head_dim)
    weights, lse = attention_probabilities(grouped, k.to(dtype), visible, scale)
    out = weighted_values(weights, v.to(dtype), visible)
    return (
        out.reshape(q.shape).to(q.dtype),
        lse.permute(2, 0, 1).reshape(queries, q_heads).float(),
    )
