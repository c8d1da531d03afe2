"""The same maths as the oracle by plain torch operators in the tensors' own dtype.

This is what a result's error is measured against: every intermediate is rounded to the dtype, as an
eager model does it. Arguments are those of `oracle`, as tensors.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight, rounded at each step."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool,
    q_scale: Tensor | None = None,
) -> Tensor:
    """Rotate (tokens, heads, head_dim) pairs; rows with position < 0 stay as they are."""
    row = positions.clamp(min=0).long()
    cos, sin = cos[row].to(x.dtype)[:, None], sin[row].to(x.dtype)[:, None]
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    if q_scale is not None:
        out = out * q_scale[row].to(x.dtype)[:, None, None]
    return torch.where((positions < 0)[:, None, None], x, out)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: list[int],
    k_positions: list[int],
    *,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention of one sequence; the LSE is at least float32 maths on q and k."""
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    i = torch.tensor(q_positions, device=q.device)[:, None]
    j = torch.tensor(k_positions, device=q.device, dtype=i.dtype)[None, :]
    seen = torch.ones_like(i - j, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= j > i - window
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    shares = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
    out = torch.einsum("hij,jhd->ihd", shares.masked_fill(~seen, 0.0), v)
    wide = torch.promote_types(q.dtype, torch.float32)
    exact_scores = torch.einsum("ihd,jhd->hij", q.to(wide), k.to(wide)) * scale
    return out, exact_scores.masked_fill(~seen, -math.inf).logsumexp(-1).T


def expert_mlp(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
    """Add up the experts of each token in turn, in the dtype of x."""
    out = torch.zeros_like(x)
    for token, slot in torch.cartesian_prod(*(torch.arange(n) for n in expert_ids.shape)):
        expert = int(expert_ids[token, slot])
        if 0 <= expert < len(w13):
            inner = silu_mul(w13[expert] @ x[token])
            out[token] += weights[token, slot].to(x.dtype) * (w2[expert] @ inner)
    return out
