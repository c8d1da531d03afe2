"""`experts_implementation="mistral_kernels"`: the experts function, on `expert_mlp`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mistral_kernels.integrations.attention_plan import NAME
from mistral_kernels.ops.checks import compute_dtype
from mistral_kernels.ops.dispatch import BoundOp

EXPERT_MLP = BoundOp("expert_mlp", "auto")

SWITCH = f'experts_implementation="{NAME}"'
SILU = tuple({type(ACT2FN[name]) for name in ("silu", "swish")})
# What a class of experts says of itself, and what `expert_mlp` wants to hear.
WANTED = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def check_experts(experts: nn.Module, w13: Tensor, w2: Tensor) -> None:
    """Refuses experts that `expert_mlp` would compute otherwise than they do."""
    for name, wanted in WANTED.items():
        if getattr(experts, name, wanted) != wanted:
            raise ValueError(
                f"{SWITCH}: {type(experts).__name__} must have {name}={wanted}, got {not wanted};"
                ' use "grouped_mm"'
            )
    gate = getattr(type(experts), "_apply_gate", None)
    own = gate is not None and gate.__module__ != "transformers.integrations.moe"
    if own or not isinstance(experts.act_fn, SILU):
        raise ValueError(
            f'{SWITCH}: {type(experts).__name__} must compute silu(gate) * up; use "grouped_mm"'
        )
    (count, rows, hidden), down = w13.shape, w2.shape
    if down != (count, hidden, rows // 2) or w13.stride(2) != 1 or w2.stride(2) != 1:
        raise ValueError(
            f"{SWITCH}: gate_up_proj and down_proj must be (experts, 2 * ffn_dim, hidden) and"
            f" (experts, hidden, ffn_dim), got {tuple(w13.shape)} and {tuple(w2.shape)}"
        )


def experts_function(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The chosen experts of each token, weighted and summed.

    Args:
        experts: holds gate_up_proj (experts, 2 * ffn_dim, hidden), gate first, and down_proj
            (experts, hidden, ffn_dim).
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, top_k), any integers; those outside 0 .. experts - 1, which stand for
            experts of another process, are skipped.
        top_k_weights: (tokens, top_k).

    Returns:
        (tokens, hidden), hidden_states' dtype.

    Raises:
        ValueError: experts of another form; the text says what to use instead.
    """
    w13, w2 = experts.gate_up_proj, experts.down_proj
    check_experts(experts, w13, w2)
    out = EXPERT_MLP(
        hidden_states.to(w13.dtype).contiguous(),
        w13,
        w2,
        top_k_weights.to(compute_dtype(w13.dtype)).contiguous(),
        top_k_index.to(torch.int32).contiguous(),
        False,  # batch_invariant
    )
    return out.to(hidden_states.dtype)
