"""What every op should return, in float64 and in plain loops over tokens, heads and keys.

Written from the definitions and sharing no code with the ops: arrays are numpy float64, positions
are integers, and a sequence's keys are a plain list in position order, never a ring. `None`
windows, negative positions and skipped experts are spelled out as the definitions do.
"""

import math
from itertools import product

import numpy as np
import torch


def f64(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor of any floating dtype as a float64 array."""
    return tensor.detach().cpu().double().numpy()


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight, one row at a time; x is (rows, hidden)."""
    out = np.empty_like(x)
    for row, value in enumerate(x):
        mean_square = sum(float(e) * float(e) for e in value) / len(value)
        out[row] = value / math.sqrt(mean_square + eps) * weight
    return out


def silu_mul(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) * up for rows of (gate, up) halves."""
    half = gate_up.shape[-1] // 2
    out = np.empty((*gate_up.shape[:-1], half))
    for index in np.ndindex(*out.shape):
        gate, up = gate_up[index], gate_up[(*index[:-1], half + index[-1])]
        out[index] = gate * sigmoid(gate) * up
    return out


def sigmoid(value: float) -> float:
    """1 / (1 + e^-value), without overflow for large negative values."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """out[row, o] = sum over i of x[row, i] * weight[o, i]."""
    return np.array([[math.fsum(row * line) for line in weight] for row in x]).reshape(
        len(x), len(weight)
    )


def rope(
    x: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    positions: list[int],
    *,
    interleaved: bool,
    q_scale: np.ndarray | None = None,
) -> np.ndarray:
    """Rotate each pair of a head as a complex number; rows with position < 0 stay as they are."""
    tokens, heads, head_dim = x.shape
    out = x.copy()
    for token, head, pair in product(range(tokens), range(heads), range(head_dim // 2)):
        position = positions[token]
        if position < 0:
            continue
        if interleaved:
            first, second = 2 * pair, 2 * pair + 1
        else:
            first, second = pair, pair + head_dim // 2
        turn = complex(cos[position, pair], sin[position, pair])
        turned = complex(x[token, head, first], x[token, head, second]) * turn
        scale = 1.0 if q_scale is None else q_scale[position]
        out[token, head, first] = turned.real * scale
        out[token, head, second] = turned.imag * scale
    return out


def visible(query: int, key: int, window: int | None, causal: bool) -> bool:
    """The one definition of a mask: key j is seen by query i iff i - W < j <= i."""
    if causal and key > query:
        return False
    return window is None or query - window < key


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: list[int],
    k_positions: list[int],
    *,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend one sequence's queries over its keys.

    q is (queries, q_heads, head_dim), k and v are (keys, kv_heads, head_dim). Returns the output
    like q and the natural-log LSE (queries, q_heads); a query that sees nothing gets 0 and -inf.
    """
    queries, q_heads, head_dim = q.shape
    group = q_heads // k.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out, lse = np.zeros_like(q), np.full((queries, q_heads), -math.inf)
    for i, head in product(range(queries), range(q_heads)):
        seen = [
            j for j, key in enumerate(k_positions) if visible(q_positions[i], key, window, causal)
        ]
        if not seen:
            continue
        scores = [scale * float(q[i, head] @ k[j, head // group]) for j in seen]
        top = max(scores)
        total = sum(math.exp(score - top) for score in scores)
        for j, score in zip(seen, scores, strict=True):
            out[i, head] += math.exp(score - top) / total * v[j, head // group]
        lse[i, head] = top + math.log(total)
    return out, lse


def route_experts(
    logits: np.ndarray, top_k: int, positions: list[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose by value, then by the lower index, and take the softmax over the chosen logits."""
    weights = np.zeros((len(logits), top_k))
    expert_ids = np.full((len(logits), top_k), -1)
    for row, values in enumerate(logits):
        if positions is not None and positions[row] < 0:
            continue
        chosen = sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]
        shares = [math.exp(values[e] - values[chosen[0]]) for e in chosen]
        weights[row] = [share / sum(shares) for share in shares]
        expert_ids[row] = chosen
    return weights, expert_ids


def expert_mlp(
    x: np.ndarray, w13: np.ndarray, w2: np.ndarray, weights: np.ndarray, expert_ids: np.ndarray
) -> np.ndarray:
    """Add weight * w2(silu(w1 x) * (w3 x)) of each chosen expert; an id that is none is skipped."""
    experts, ffn_dim = len(w13), w13.shape[1] // 2
    out = np.zeros_like(x)
    for token, slot in product(range(len(x)), range(expert_ids.shape[1])):
        expert = int(expert_ids[token, slot])
        if not 0 <= expert < experts:
            continue
        gate = w13[expert, :ffn_dim] @ x[token]
        up = w13[expert, ffn_dim:] @ x[token]
        inner = np.array([g * sigmoid(g) * u for g, u in zip(gate, up, strict=True)])
        out[token] += weights[token, slot] * (w2[expert] @ inner)
    return out


def quantise(x: np.ndarray, scale: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return round(x / scale) as int8 or fp8 stores it; times scale it reads back as about x.

    x is (tokens, kv_heads, head_dim); scale is (1,) or (kv_heads,). The quotient is a float32 one:
    the definition is fp32 inside, and a bf16 x meets half-way cases that differ in float64.
    """
    out = np.empty_like(x)
    scale = np.broadcast_to(scale, x.shape[1:2]).astype(np.float32)
    rounded = round_int8 if dtype == torch.int8 else round_fp8
    for token, head, d in np.ndindex(*x.shape):
        out[token, head, d] = rounded(float(np.float32(x[token, head, d]) / scale[head]))
    return out


def round_int8(value: float) -> float:
    """Round half to even, then clamp to [-128, 127]."""
    return float(min(max(round(value), -128), 127))


def round_fp8(value: float) -> float:
    """Round to the nearest float8_e4m3fn, ties to an even mantissa, clamped to +-448.

    e4m3: three mantissa bits; exponents -6..8, below which the spacing stays 2^-9.
    """
    size = min(abs(value), 448.0)
    exponent = max(math.floor(math.log2(size)), -6) if size else -6
    spacing = 2.0 ** (exponent - 3)
    return math.copysign(min(round(size / spacing) * spacing, 448.0), value)
