"""`enable(model)`: parts of a transformers model on our ops; `disable(model)` takes them back.

Each module keeps its class, its parameters and its place; only its `forward` is its own until
`disable`. So saving, PEFT and optimizers see the model that they know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mistral_kernels.integrations.attention_plan import packed
from mistral_kernels.integrations.transformers_experts import SILU
from mistral_kernels.ops import rms_norm
from mistral_kernels.ops.checks import compute_dtype
from mistral_kernels.ops.dispatch import BoundOp

NAMES = ("linear", "rms_norm", "rope", "route_experts", "silu_mul")
LINEAR, RMS_NORM, ROPE, ROUTE_EXPERTS, SILU_MUL = (BoundOp(name, "auto") for name in NAMES)

FAMILIES = ("llama", "ministral", "ministral3", "mistral", "mixtral", "qwen2", "qwen3")
MODULES = {f"transformers.models.{name}.modeling_{name}" for name in FAMILIES}
BEFORE = "_before_mistral_kernels"  # of a swapped module: (our forward, what stood in its place)
# Where a module's own forward stands: accelerate's hooks, put on and off at any time, move it.
PLACES = ("forward", "_old_forward")
ROTATE = "apply_rotary_pos_emb"  # the function that attention layers call by this global name


class Rotation(NamedTuple):
    """What layers get in place of cos, and again in place of sin."""

    cos: Tensor  # (rows, head_dim / 2), float32
    sin: Tensor  # the same
    positions: Tensor  # (batch * tokens,), int32, row of each token


def norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm, rounded once; in the wider dtype where x and the weight differ, as torch does."""
    weight = self.weight
    if x.dtype == weight.dtype and _rows_lie_well(x, weight.shape[0]):
        return RMS_NORM(x, weight, self.variance_epsilon)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return rms_norm(x.to(dtype).contiguous(), weight.to(dtype), self.variance_epsilon)


def linear_forward(self: nn.Linear, x: Tensor) -> Tensor:
    weight = self.weight
    fits = x.dtype == weight.dtype and x.dim() > 1 and _rows_lie_well(x, weight.shape[1])
    # A quantised or sharded weight is a Tensor of another type, whose memory says nothing.
    fits = fits and weight.stride(1) == 1 and type(weight) in (nn.Parameter, Tensor)
    if fits and not torch.is_autocast_enabled("cpu"):
        return LINEAR(x, weight, False)
    # Autocast, one vector, a transposed weight, or a mistake: torch has the answer.
    return functional.linear(x, weight)


def feed_forward(self: nn.Module, x: Tensor) -> Tensor:
    gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), -1)
    return self.down_proj(SILU_MUL(gate_up))


def router_forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtral's router; a softmax over the chosen logits is their share of the whole softmax."""
    logits = linear_forward(self, x.reshape(-1, self.hidden_dim))
    weights, expert_ids = ROUTE_EXPERTS(logits, self.top_k, None)
    return logits, weights, expert_ids.long()


def _rows_lie_well(x: Tensor, columns: int) -> bool:
    """What the public functions check and kernels rely on."""
    return x.shape[-1] == columns and x.stride(-1) == 1


def tables_forward(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Rotation, Rotation]:
    """cos and sin as the module makes them, in float32 and without their second half."""
    wide = x.new_empty(0, dtype=compute_dtype(x.dtype))
    cos, sin = type(self).forward(self, wide, position_ids)  # (batch or 1, tokens, head_dim)
    half = cos.shape[-1] // 2
    tables = (table[..., :half].flatten(0, 1) for table in (cos, sin))
    positions = torch.arange(x.shape[0] * x.shape[1], device=x.device, dtype=torch.int32)
    if cos.shape[0] != x.shape[0]:
        positions = positions % cos.shape[1]
    rotation = Rotation(*tables, positions)
    return rotation, rotation


def rotate(q: Tensor, k: Tensor, rotation: Rotation, _: Rotation, **layout) -> tuple[Tensor, ...]:
    """Rotates q and k, (batch, heads, tokens, head_dim) each; no copy where they are views of
    (batch, tokens, heads, head_dim)."""
    batch, _, tokens, head_dim = q.shape
    if 2 * rotation.cos.shape[1] != head_dim:
        raise ValueError(
            f"enable: rotary embeddings must turn all {head_dim} columns of a head, got"
            f" {2 * rotation.cos.shape[1]}"
        )
    rows = (packed(x) for x in (q, k))
    turned = ROPE(*rows, *rotation, False, None)
    return tuple(x.view(batch, tokens, *x.shape[1:]).transpose(1, 2) for x in turned)


def with_our_rotation(forward: Callable) -> Callable:
    """The same code, which finds `rotate` under the name of its own function.

    The function of the module stays as it is: other models may use it.
    """
    names = {**forward.__globals__, ROTATE: rotate}
    # torch.compile would look up the names of a module of that name instead of these.
    del names["__name__"]
    copied = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _is(module: nn.Module, ending: str) -> bool:
    return type(module).__module__ in MODULES and type(module).__name__.endswith(ending)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether somebody else has replaced this module's forward: then it is not ours to drop."""
    return vars(module).get(_place(module)) not in (None, _own_forward(module))


def _own_forward(module: nn.Module) -> MethodType:
    return MethodType(type(module).forward, module)


def _place(module: nn.Module) -> str:
    return PLACES[hasattr(module, "_hf_hook")]  # a hook stands in `forward` and calls the other


def _can_rotate(part: nn.Module) -> bool:
    """A rotary embedding and all layers that it serves are swapped together."""
    if _has_own_forward(part):
        return False
    forward = type(part).forward
    return (
        _is(part, "RotaryEmbedding")
        or ROTATE in inspect.unwrap(forward).__code__.co_names
        and forward.__closure__ is None
    )


def _replacement(module: nn.Module, rotates: bool) -> tuple[str, Callable] | None:
    """The op that serves a module, and its forward."""
    if _has_own_forward(module):
        return None
    if _is(module, "RMSNorm"):
        return "rms_norm", norm_forward
    if _is(module, "MLP") and isinstance(module.act_fn, SILU):
        return "silu_mul", feed_forward
    if _is(module, "TopKRouter"):
        return "route_experts", router_forward
    if rotates and _is(module, "RotaryEmbedding"):
        return "rope", tables_forward
    if rotates and _is(module, "Attention"):
        return "rope", with_our_rotation(type(module).forward)
    # On a GPU torch's product is the one that `linear` would call.
    if type(module) is nn.Linear and module.bias is None and module.weight.device.type == "cpu":
        return "linear", linear_forward
    return None


def enable(model: nn.Module) -> dict[str, str]:
    """Swaps parts of a model of transformers for our ops, in place.

    RMSNorm, rotary embeddings, SwiGLU feed-forwards and Mixtral's routers of Mistral, Mixtral,
    Ministral, Ministral 3, Llama, Qwen 2 and Qwen 3; on the CPU also linear layers without a bias,
    of any model. Gradients flow through all of them. Attention and experts have their own switch:
    `attn_implementation`, `experts_implementation`.

    Args:
        model: a model of transformers, or any module that holds one, such as a PEFT model. Modules
            whose `forward` somebody else has replaced keep that.

    Returns:
        Names of the swapped modules, and the op that serves each. Modules that `enable` has swapped
        before are swapped again, and not twice.

    Raises:
        ValueError: nothing in the model can be swapped.
    """
    disable(model)
    modules = dict(model.named_modules())
    rotating = (m for m in modules.values() if _is(m, "Attention") or _is(m, "RotaryEmbedding"))
    rotates = all(_can_rotate(module) for module in rotating)
    swapped = {}
    for name, module in modules.items():
        if replacement := _replacement(module, rotates):
            swapped[name], forward = replacement
            place, ours = _place(module), MethodType(forward, module)
            setattr(module, BEFORE, (ours, vars(module).get(place)))
            setattr(module, place, ours)
    if not swapped:
        raise ValueError(
            f"enable: model must hold parts of {', '.join(FAMILIES)}, got {type(model).__name__}"
        )
    return swapped


def disable(model: nn.Module) -> list[str]:
    """Puts back what `enable` swapped.

    Args:
        model: what `enable` was given.

    Returns:
        Names of the modules that are themselves again.
    """
    restored = []
    for name, module in model.named_modules():
        if BEFORE in vars(module):
            ours, before = vars(module).pop(BEFORE)
            for place in PLACES:
                if vars(module).get(place) == ours:
                    setattr(module, place, before or _own_forward(module))
            if vars(module).get("forward") == _own_forward(module):
                del module.forward
            restored.append(name)
    return restored
