"""`enable(model)`: parts of a transformers model on our ops; `disable(model)` takes them back.

Each module keeps its class, its parameters and its place; only its `forward` is its own until
`disable`. So saving, PEFT and optimizers see the model that they know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType

from torch import nn

from mistral_kernels.integrations.transformers_decode import layer_forward
from mistral_kernels.integrations.transformers_experts import SILU
from mistral_kernels.integrations.transformers_forwards import (
    ROTATE,
    attention_forward,
    feed_forward,
    linear_forward,
    norm_forward,
    rotated_forward,
    router_forward,
    tables_forward,
)

FAMILIES = ("llama", "ministral", "ministral3", "mistral", "mixtral", "qwen2", "qwen3")
MODULES = {f"transformers.models.{name}.modeling_{name}" for name in FAMILIES}
BEFORE = "_before_mistral_kernels"  # of a swapped module: (our forward, what stood in its place)
# Where a module's own forward stands: accelerate's hooks, put on and off at any time, move it.
PLACES = ("forward", "_old_forward")


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
        rotated_forward(type(module))  # made now: a compiler could not
        return "rope", attention_forward
    if _is(module, "DecoderLayer"):
        return "add_rms_norm", layer_forward
    # On a GPU torch's product is the one that `linear` would call.
    if type(module) is nn.Linear and module.bias is None and module.weight.device.type == "cpu":
        return "linear", linear_forward
    return None


def enable(model: nn.Module) -> dict[str, str]:
    """Swaps parts of a model of transformers for our ops, in place.

    RMSNorm, rotary embeddings, SwiGLU feed-forwards, Mixtral's routers and decoder layers of
    Mistral, Mixtral, Ministral, Ministral 3, Llama, Qwen 2 and Qwen 3; on the CPU also linear
    layers without a bias, of any model. Gradients flow through all of them. Attention and experts
    have their own switch: `attn_implementation`, `experts_implementation`.

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
            # A partial, unlike a method, can be pickled, and keeps to its copy in a copy.
            place, ours = _place(module), partial(forward, module)
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
