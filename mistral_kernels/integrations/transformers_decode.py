"""Forwards of attention and feed-forward modules of transformers, with a short way for one token.

Around each op lie tens of microseconds of Python: a module's call, a look at its arguments, the
choice of a backend; for a linear layer of a small model as long as its weight takes to read. A step
of one token a sequence without gradients goes from op to op instead. It asks first whether each
module that it passes over still is what `enable` made of it: whatever is hooked, adapted,
quantised, sharded, or has another forward by now, goes the way of transformers' own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mistral_kernels.integrations.attention_plan import NAME, AttentionPlan
from mistral_kernels.integrations.rolling_cache import RollingCache
from mistral_kernels.integrations.transformers_attention import REFUSED
from mistral_kernels.integrations.transformers_experts import check_experts
from mistral_kernels.integrations.transformers_forwards import (
    Rotation,
    linear_forward,
    router_forward,
    with_our_rotation,
)
from mistral_kernels.ops.dispatch import BoundOp, device_capability, prefer, watched

OPS = ("linear", "rope_", "silu_mul", "route_experts", "expert_mlp")
HALF_SPLIT = (False, None)  # interleaved, q_scale
SILU_MUL = BoundOp("silu_mul", "auto")
BATCH_INVARIANT = False
ASKS_MORE = {*REFUSED, "is_causal"}  # what attention does not pass over, of what it is told

rotated: dict[type, Callable] = {}  # class of attention -> its forward, with our rotation


def attention_forward(self: nn.Module, *inputs, **named) -> tuple[Tensor, None]:
    """Any attention, rotated by our op."""
    return rotated_forward(type(self))(self, *inputs, **named)


def rotated_forward(attention: type) -> Callable:
    if attention not in rotated:
        rotated[attention] = with_our_rotation(attention.forward)
    return rotated[attention]


def plain_attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Rotation, Rotation],
    attention_mask: Tensor | None = None,
    past_key_values=None,
    **others,
) -> tuple[Tensor, None]:
    """Attention of projections, rotation and nothing else in between."""
    call = hidden_states, position_embeddings, attention_mask, past_key_values
    out = None
    short = type(past_key_values) is RollingCache and ASKS_MORE.isdisjoint(others)
    if short and is_one_token(hidden_states):
        out = _attend(self, *call)
    return attention_forward(self, *call, **others) if out is None else (out, None)


def feed_forward(self: nn.Module, x: Tensor) -> Tensor:
    out = _feed_forward(self, x) if is_one_token(x) else None
    if out is None:
        gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), -1)
        out = self.down_proj(SILU_MUL(gate_up))
    return out


def mixture_forward(self: nn.Module, x: Tensor) -> Tensor:
    """Mixtral's router and experts."""
    out = _mix(self, x) if is_one_token(x) else None
    return type(self).forward(self, x) if out is None else out


def is_one_token(x: Tensor) -> bool:
    """Whether x is (batch, 1, hidden), and nobody watches it on its way."""
    return (
        not watched(x)
        and x.shape[1:2] == (1,)
        and x.dim() == 3
        and x.is_contiguous()
        and not torch_module._has_any_global_hook()
        and not torch.is_autocast_enabled(x.device.type)
    )


def _attend(
    self: nn.Module, x: Tensor, embeddings: tuple, mask: Tensor | None, cache: RollingCache
) -> Tensor | None:
    plan, rotation = AttentionPlan.behind(mask), embeddings[0]
    projections = _linear_weights(self, x, "q_proj", "k_proj", "v_proj", "o_proj")
    if plan is None or type(rotation) is not Rotation or projections is None or self.training:
        return None
    *qkv, o = projections
    head_dim = self.head_dim
    if any(w.shape[1] != x.shape[2] for w in qkv) or 2 * rotation.cos.shape[1] != head_dim:
        return None
    cells = _cells(x.device, x.dtype, (("head_dim", head_dim),))
    rows = x.squeeze(1)
    q, k, v = (
        cells.linear(rows, weight, BATCH_INVARIANT).view(len(rows), -1, head_dim) for weight in qkv
    )
    if o.shape[1] != q.shape[1] * head_dim:
        return None
    cells.rope_(q, k, *rotation, *HALF_SPLIT)
    new, _ = cache.update(k.unsqueeze(2), v.unsqueeze(2), self.layer_idx)
    out = new.attend(q, plan, window=AttentionPlan.window_of(mask), scale=self.scaling)
    return cells.linear(out.flatten(1), o, BATCH_INVARIANT).unsqueeze(1)


def _feed_forward(self: nn.Module, x: Tensor) -> Tensor | None:
    projections = _linear_weights(self, x, "gate_proj", "up_proj", "down_proj")
    if projections is None:
        return None
    gate, up, down = projections
    if gate.shape[1] != x.shape[2] or up.shape != gate.shape or down.shape[1] != len(gate):
        return None
    cells = _cells(x.device, x.dtype)
    rows = x.squeeze(1)
    gate_up = [cells.linear(rows, weight, BATCH_INVARIANT) for weight in (gate, up)]
    inner = cells.silu_mul(torch.cat(gate_up, 1))
    return cells.linear(inner, down, BATCH_INVARIANT).unsqueeze(1)


def _mix(self: nn.Module, x: Tensor) -> Tensor | None:
    gate, experts = (self.__dict__["_modules"][name] for name in ("gate", "experts"))
    if not _runs(gate, router_forward) or type(experts) is not MixtralExperts:
        return None
    if not _runs(experts, None) or experts.config._experts_implementation != NAME:
        return None
    (router,) = _weights(gate, x, "weight")
    w13, w2 = _weights(experts, x, "gate_up_proj", "down_proj")
    if router is None or w13 is None or w2 is None:
        return None
    if router.shape[1] != x.shape[2] or w13.shape[2] != x.shape[2]:
        return None
    check_experts(experts, w13, w2)
    cells = _cells(x.device, x.dtype, (("experts", len(router)), ("top_k", gate.top_k)))
    rows = x.squeeze(1)
    logits = cells.linear(rows, router, BATCH_INVARIANT)
    routing = cells.route_experts(logits, gate.top_k, None)
    return cells.expert_mlp(rows, w13, w2, *routing, BATCH_INVARIANT).unsqueeze(1)


@functools.cache
def _cells(device: torch.device, dtype: torch.dtype, facts: tuple = ()) -> SimpleNamespace:
    """What serves each op, to be called where nobody watches."""
    call = {"device_type": device.type, "capability": device_capability(device), "dtype": dtype}
    chosen = {op: prefer(op, **call, facts=facts, backend="auto") for op in OPS}
    return SimpleNamespace(**{op: BoundOp(op, backend).run for op, backend in chosen.items()})


def _runs(module: nn.Module, forward: Callable | None) -> bool:
    """Whether a call of the module is this forward of ours, or its class's for None, and no more.

    Attributes are looked up where nn.Module keeps them: its own way takes a microsecond.
    """
    own = module.__dict__
    stands = own.get("forward")
    same = stands is None if forward is None else getattr(stands, "func", None) is forward
    return same and not own["_forward_hooks"] and not own["_forward_pre_hooks"]


def _weights(module: nn.Module, x: Tensor, *names: str) -> list[Tensor | None]:
    """Parameters that a kernel can read beside x, None for others.

    A quantised or sharded one is of another type, and one with a parametrisation is elsewhere.
    """
    own = module.__dict__["_parameters"]
    return [
        weight
        if type(weight := own.get(name)) is nn.Parameter
        and weight.dtype == x.dtype
        and weight.device == x.device
        and weight.is_contiguous()
        else None
        for name in names
    ]


def _linear_weights(parent: nn.Module, x: Tensor, *names: str) -> list[Tensor] | None:
    """Weights of linear layers, None where one is more than a product with its weight."""
    modules, found = parent.__dict__["_modules"], []
    for name in names:
        linear = modules[name]
        if type(linear) is not nn.Linear or linear.__dict__["_parameters"]["bias"] is not None:
            return None
        if not (_runs(linear, linear_forward) or _runs(linear, None)):
            return None
        found += _weights(linear, x, "weight")
    return None if any(weight is None for weight in found) else found
