"""The steps of a mixture of experts with weights of either kind: plan, up, down, combine."""

import torch

from mistral_kernels.kernels.expert_combine import expert_combine
from mistral_kernels.kernels.expert_down import expert_down
from mistral_kernels.kernels.expert_plan import expert_plan
from mistral_kernels.kernels.expert_tiles import FEW_TOKENS, expert_rows
from mistral_kernels.kernels.expert_up import expert_up
from mistral_kernels.kernels.low_bit_codes import Codes


def bytes_a_token(top_k: int, hidden: int, ffn_dim: int, dtype: torch.dtype) -> int:
    """Workspace of a token among many: `inner`, `slots`, its places in the plan."""
    return top_k * (ffn_dim * dtype.itemsize + hidden * 4 + 8)


def expert_steps(
    x: torch.Tensor,
    w13: torch.Tensor | Codes,
    w2: torch.Tensor | Codes,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    out: torch.Tensor,
    sizes: tuple[int, int],
    batch_invariant: bool,
) -> None:
    """Writes `out`.

    Args:
        x, weights, expert_ids, out, batch_invariant: of `expert_mlp`; at least one token.
        w13: of `expert_up`.
        w2: of `expert_down`.
        sizes: experts and ffn_dim, at least 1.
    """
    (experts, ffn_dim), (tokens, top_k) = sizes, weights.shape
    few = tokens <= FEW_TOKENS and not batch_invariant
    rows = tokens if few else expert_rows(tokens, top_k, experts, batch_invariant)
    pairs = tokens * top_k
    inner = x.new_empty(tokens * experts if few else pairs, ffn_dim)
    starts = order = places = None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if not few:
            starts, order, places = (expert_ids.new_empty(n) for n in (experts + 1, pairs, pairs))
            expert_plan(expert_ids, experts, starts, order, places)
        expert_up(x, w13, expert_ids, starts, order, inner, rows, gate_up=False)
        slots, splits = expert_down(inner, w2, expert_ids, starts, rows)
        expert_combine(slots, weights, expert_ids, places, out, experts, splits)
