"""One token through a layer of transformers, from op to op.

Around each op lie tens of microseconds of Python: a module's call, a look at its arguments, the
choice of a backend; for a linear layer of a small model as long as its weight takes to read. A step
of one token a sequence without gradients runs a layer's ops in a row instead. It asks first whether
each module that it passes over still is what `enable` made of it: a half of a layer in which
something is hooked, adapted, quantised, sharded, or has another forward by now, is called as
transformers would call it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from mistral_kernels.integrations.attention_plan import NAME, AttentionPlan
from mistral_kernels.integrations.rolling_cache import RollingCache
from mistral_kernels.integrations.transformers_attention import REFUSED
from mistral_kernels.integrations.transformers_experts import check_experts
from mistral_kernels.integrations.transformers_forwards import (
    Rotation,
    attention_forward,
    feed_forward,
    linear_forward,
    norm_forward,
    router_forward,
)
from mistral_kernels.ops.dispatch import BoundOp, device_capability, prefer, watched

OPS = ("linear", "rms_norm", "add_rms_norm", "rope_", "silu_mul", "route_experts", "expert_mlp")
HALF_SPLIT = (False, None)  # interleaved, q_scale
BATCH_INVARIANT = False
ASKS_MORE = {*REFUSED, "is_causal"}  # what attention does not pass over, of what it is told
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
# Between projections and attention they have the rotation and no more.
PLAIN = {
    f"transformers.models.{name}.modeling_{name}"
    for name in ("llama", "ministral", "mistral", "mixtral")
}


def layer_forward(self: nn.Module, hidden_states: Tensor, *inputs, **named) -> Tensor:
    """A decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""
    if not inputs and _is_one_token(hidden_states):
        out = _one_token(self, hidden_states.squeeze(1), named)
        if out is not None:
            return out.unsqueeze(1)
    return type(self).forward(self, hidden_states, *inputs, **named)


def _is_one_token(x: Tensor) -> bool:
    """Whether x is (batch, 1, hidden), and nobody watches it on its way."""
    return (
        x.dim() == 3
        and x.shape[1] == 1
        and not watched(x)
        and x.is_contiguous()
        and not torch_module._has_any_global_hook()
        and not torch.is_autocast_enabled(x.device.type)
    )


def _one_token(layer: nn.Module, x: Tensor, named: dict) -> Tensor | None:
    """x (batch, hidden) after the layer, or None where attention or a norm is not ours to pass."""
    modules = layer.__dict__["_modules"]
    attention, mlp = modules["self_attn"], modules["mlp"]
    first, second = modules["input_layernorm"], modules["post_attention_layernorm"]
    norms = _weights((first, second), norm_forward, x)
    plan = AttentionPlan.behind(named.get("attention_mask"))
    projections = _projections(attention, x, named)
    if norms is None or plan is None or projections is None:
        return None
    if not norms[0].shape == norms[1].shape == x.shape[1:]:
        return None
    cells = _cells(x.device, x.dtype, mlp.top_k if _is_mixture(mlp) else 0)
    normed = cells.rms_norm(x, norms[0], first.variance_epsilon)
    attended = _attend(attention, normed, projections, plan, named, cells)
    normed, x = cells.add_rms_norm(attended, x, norms[1], second.variance_epsilon)
    feed = _mix if _is_mixture(mlp) else _feed_forward
    out = feed(mlp, normed, cells)
    return x + (mlp(normed.unsqueeze(1)).squeeze(1) if out is None else out)


def _projections(attention: nn.Module, x: Tensor, named: dict) -> list[Tensor] | None:
    """Weights of q, k, v and o, where attention over the ring is all that is between them."""
    own, cache = attention.__dict__, named.get("past_key_values")
    if type(cache) is not RollingCache or not ASKS_MORE.isdisjoint(named):
        return None
    if type(attention).__module__ not in PLAIN or own["training"]:
        return None
    if not _runs(own, attention_forward):
        return None
    rotation, head_dim = named["position_embeddings"][0], own["head_dim"]
    if type(rotation) is not Rotation or 2 * rotation.cos.shape[1] != head_dim:
        return None
    if not cache.layers[own["layer_idx"]].takes(x):
        return None
    weights = _weights((own["_modules"][name] for name in PROJECTIONS), linear_forward, x)
    if weights is None:
        return None
    q, k, v, o = (weight.shape for weight in weights)
    hidden = x.shape[1]
    fits = q[1] == k[1] == v[1] == hidden and o[1] == q[0] and k[0] == v[0]
    return weights if fits and not (q[0] % k[0] or k[0] % head_dim) else None


def _attend(
    attention: nn.Module,
    x: Tensor,
    projections: list[Tensor],
    plan: AttentionPlan,
    named: dict,
    cells: SimpleNamespace,
) -> Tensor:
    own, cache = attention.__dict__, named["past_key_values"]
    batch, head_dim, index = x.shape[0], own["head_dim"], own["layer_idx"]
    *qkv, o = projections
    q, k, v = (cells.linear(x, weight, BATCH_INVARIANT).view(batch, -1, head_dim) for weight in qkv)
    cells.rope_(q, k, *named["position_embeddings"][0], *HALF_SPLIT)
    cache.check_step(index, 1)
    ring = cache.layers[index]
    ring.expect(batch, k.shape[1], 1, head_dim)
    window = AttentionPlan.window_of(named["attention_mask"])
    out = ring.attend_rows(q, k, v, 1, plan, window, own["scaling"])
    return cells.linear(out.view(batch, -1), o, BATCH_INVARIANT)


def _feed_forward(mlp: nn.Module, x: Tensor, cells: SimpleNamespace) -> Tensor | None:
    own = mlp.__dict__
    if not _runs(own, feed_forward):
        return None
    weights = _weights((own["_modules"][name] for name in GATED), linear_forward, x)
    if weights is None:
        return None
    gate, up, down = weights
    if gate.shape[1] != x.shape[1] or up.shape != gate.shape or down.shape[1] != gate.shape[0]:
        return None
    gate_up = [cells.linear(x, weight, BATCH_INVARIANT) for weight in (gate, up)]
    return cells.linear(cells.silu_mul(torch.cat(gate_up, 1)), down, BATCH_INVARIANT)


def _is_mixture(mlp: nn.Module) -> bool:
    return type(mlp) is MixtralSparseMoeBlock


def _mix(mlp: nn.Module, x: Tensor, cells: SimpleNamespace) -> Tensor | None:
    own = mlp.__dict__
    gate, experts = own["_modules"]["gate"], own["_modules"]["experts"]
    if not _runs(own, None) or type(experts) is not MixtralExperts:
        return None
    router = _weights((gate,), router_forward, x)
    stacked = _weights((experts,), None, x, ("gate_up_proj", "down_proj"))
    if router is None or stacked is None or experts.config._experts_implementation != NAME:
        return None
    check_experts(experts, *stacked)
    if not router[0].shape[1] == stacked[0].shape[2] == x.shape[1]:
        return None
    logits = cells.linear(x, router[0], BATCH_INVARIANT)
    routing = cells.route_experts(logits, gate.__dict__["top_k"], None)
    return cells.expert_mlp(x, *stacked, *routing, BATCH_INVARIANT)


@functools.cache
def _cells(device: torch.device, dtype: torch.dtype, top_k: int) -> SimpleNamespace:
    """What serves each op, to be called where nobody watches."""
    call = {"device_type": device.type, "capability": device_capability(device), "dtype": dtype}
    facts = (("top_k", top_k),) if top_k else ()
    chosen = {op: prefer(op, **call, facts=facts, backend="auto") for op in OPS}
    return SimpleNamespace(**{op: BoundOp(op, backend).run for op, backend in chosen.items()})


def _runs(own: dict, forward: Callable | None) -> bool:
    """Whether calling a module of these attributes is `forward`, of ours, and no more.

    None stands for its class's. nn.Module's own way to an attribute would take a microsecond.
    """
    stands = own.get("forward")
    same = stands is None if forward is None else getattr(stands, "func", None) is forward
    return same and not own["_forward_hooks"] and not own["_forward_pre_hooks"]


def _weights(
    modules: Iterable[nn.Module],
    forward: Callable | None,
    x: Tensor,
    names: tuple[str, ...] = ("weight",),
) -> list[Tensor] | None:
    """Parameters of modules that run `forward`, if all of them can be read by a kernel beside x.

    A quantised or sharded one is of another type, and one with a parametrisation is elsewhere.
    """
    found, dtype, device = [], x.dtype, x.device
    for module in modules:
        own = module.__dict__
        parameters = own["_parameters"]
        if not _runs(own, forward) and not (type(module) is nn.Linear and _runs(own, None)):
            return None
        if parameters.get("bias") is not None:
            return None
        for name in names:
            weight = parameters.get(name)
            if type(weight) is not nn.Parameter or weight.dtype is not dtype:
                return None
            if weight.device != device or not weight.is_contiguous():
                return None
            found.append(weight)
    return found
