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
from mistral_kernels.integrations.recorded_layers import LayerStep, replayed, run_recorded
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
from mistral_kernels.ops.dispatch import BoundOp, device_capability, prefer
from mistral_kernels.ops.watched import watched

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


def _step(layer: nn.Module, x: Tensor, named: dict) -> LayerStep | None:
    """What the layer is given, where attention over a ring is all that is asked of it."""
    attention, cache = layer.__dict__["_modules"]["self_attn"], named.get("past_key_values")
    if type(attention).__module__ not in PLAIN or type(cache) is not RollingCache:
        return None
    mask, rotation = named.get("attention_mask"), named["position_embeddings"][0]
    plan = AttentionPlan.behind(mask)
    if plan is None or type(rotation) is not Rotation or not ASKS_MORE.isdisjoint(named):
        return None
    step = LayerStep(
        x, rotation, plan, AttentionPlan.window_of(mask), cache, attention.__dict__["layer_idx"]
    )
    return step if step.ring.takes(x) else None


def _one_token(layer: nn.Module, x: Tensor, named: dict) -> Tensor | None:
    """x (batch, hidden) after the layer, or None where attention or a norm is not ours to pass."""
    if (step := _step(layer, x, named)) is None:
        return None
    modules = layer.__dict__["_modules"]
    attention, mlp = modules["self_attn"], modules["mlp"]
    first, second = modules["input_layernorm"], modules["post_attention_layernorm"]
    facts = _facts(attention, mlp, first, second)
    if (out := replayed(layer, facts, step)) is not None:
        return out
    norms = _weights((first, second), norm_forward, x)
    projections = _projections(attention, step)
    if norms is None or projections is None:
        return None
    if not norms[0].shape == norms[1].shape == x.shape[1:]:
        return None
    cells = _cells(x.device, x.dtype, mlp.top_k if _is_mixture(mlp) else 0)
    scale, ring = attention.__dict__["scaling"], step.ring
    own_feed = (_mixture if _is_mixture(mlp) else _gated)(mlp, x, cells)
    feed = own_feed or (lambda normed: mlp(normed.unsqueeze(1)).squeeze(1))

    def compute(x: Tensor, rotation: Rotation, plan: AttentionPlan) -> Tensor:
        normed = cells.rms_norm(x, norms[0], first.variance_epsilon)
        q, k, v = _rotated(normed, projections, rotation, ring.head_dim, cells)
        attended = ring.attend_rows(q, k, v, 1, plan, step.window, scale)
        attended = cells.linear(attended.view(len(x), -1), projections[3], BATCH_INVARIANT)
        normed, x = cells.add_rms_norm(attended, x, norms[1], second.variance_epsilon)
        return torch.add(x, feed(normed), out=x.new_empty(x.shape))

    step.begin()
    # What others' code does between the calls, a replay would leave out.
    out = run_recorded(layer, facts, step, compute) if own_feed else compute(x, *step[1:3])
    ring.advance(1)
    return out


def _facts(attention: nn.Module, mlp: nn.Module, *norms: nn.Module) -> tuple:
    """What a layer's calls depend on besides its modules and their tensors."""
    mixture = ()
    if _is_mixture(mlp):
        parts = mlp.__dict__["_modules"]
        mixture = (_implementation(parts["experts"]), parts["gate"].top_k)
    return (attention.__dict__["scaling"], *(norm.variance_epsilon for norm in norms), *mixture)


def _implementation(experts: nn.Module) -> str | None:
    # Past a config's own look-up of names, which doubles the microseconds.
    config = experts.__dict__.get("config")  # none where others wrap them
    return config and object.__getattribute__(config, "_experts_implementation")


def _projections(attention: nn.Module, step: LayerStep) -> list[Tensor] | None:
    """Weights of q, k, v and o, where rotation and attention are all that is between them."""
    own, x = attention.__dict__, step.x
    if own["training"] or not _runs(own, attention_forward):
        return None
    head_dim, ring = own["head_dim"], step.ring
    if 2 * step.rotation.cos.shape[1] != head_dim:
        return None
    weights = _weights((own["_modules"][name] for name in PROJECTIONS), linear_forward, x)
    if weights is None:
        return None
    q, k, v, o = (weight.shape for weight in weights)
    hidden = x.shape[1]
    fits = q[1] == k[1] == v[1] == hidden and o[1] == q[0] and k[0] == v[0]
    fits = fits and not (q[0] % k[0] or k[0] % head_dim)
    return (
        weights if fits and (k[0] // head_dim, head_dim) == (ring.kv_heads, ring.head_dim) else None
    )


def _rotated(
    x: Tensor, weights: list[Tensor], rotation: Rotation, head_dim: int, cells: SimpleNamespace
) -> list[Tensor]:
    """q, k and v, (batch, heads, head_dim) each."""
    q, k, v = (
        cells.linear(x, weight, BATCH_INVARIANT).view(len(x), -1, head_dim)
        for weight in weights[:3]
    )
    cells.rope_(q, k, *rotation, *HALF_SPLIT)
    return q, k, v


def _gated(mlp: nn.Module, x: Tensor, cells: SimpleNamespace) -> Callable[[Tensor], Tensor] | None:
    """The feed-forward of rows like x, or None where it is not ours to pass."""
    own = mlp.__dict__
    if not _runs(own, feed_forward):
        return None
    weights = _weights((own["_modules"][name] for name in GATED), linear_forward, x)
    if weights is None:
        return None
    gate, up, down = weights
    if gate.shape[1] != x.shape[1] or up.shape != gate.shape or down.shape[1] != gate.shape[0]:
        return None

    def feed(x: Tensor) -> Tensor:
        gate_up = [cells.linear(x, weight, BATCH_INVARIANT) for weight in (gate, up)]
        joined = torch.cat(gate_up, 1, out=x.new_empty(len(x), 2 * gate.shape[0]))
        return cells.linear(cells.silu_mul(joined), down, BATCH_INVARIANT)

    return feed


def _is_mixture(mlp: nn.Module) -> bool:
    return type(mlp) is MixtralSparseMoeBlock


def _mixture(
    mlp: nn.Module, x: Tensor, cells: SimpleNamespace
) -> Callable[[Tensor], Tensor] | None:
    """As `_gated`, of experts."""
    own = mlp.__dict__
    gate, experts = own["_modules"]["gate"], own["_modules"]["experts"]
    if own["training"] or not _runs(own, None) or type(experts) is not MixtralExperts:
        return None
    router = _weights((gate,), router_forward, x)
    stacked = _weights((experts,), None, x, ("gate_up_proj", "down_proj"))
    if router is None or stacked is None or _implementation(experts) != NAME:
        return None
    check_experts(experts, *stacked)
    if not router[0].shape[1] == stacked[0].shape[2] == x.shape[1]:
        return None

    def feed(x: Tensor) -> Tensor:
        logits = cells.linear(x, router[0], BATCH_INVARIANT)
        routing = cells.route_experts(logits, gate.__dict__["top_k"], None)
        return cells.expert_mlp(x, *stacked, *routing, BATCH_INVARIANT)

    return feed


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
