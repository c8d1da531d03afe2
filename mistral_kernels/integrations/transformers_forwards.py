"""Forwards of modules of transformers, each on one op of ours; `enable` puts them in place."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mistral_kernels.integrations.attention_plan import packed
from mistral_kernels.ops import rms_norm
from mistral_kernels.ops.checks import compute_dtype
from mistral_kernels.ops.dispatch import BoundOp

NAMES = ("linear", "rms_norm", "rope", "route_experts", "silu_mul")
LINEAR, RMS_NORM, ROPE, ROUTE_EXPERTS, SILU_MUL = (BoundOp(name, "auto") for name in NAMES)

ROTATE = "apply_rotary_pos_emb"  # the function that attention layers call by this global name
ROTATED: dict[type[nn.Module], Callable] = {}  # what `rotated_forward` has made


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


def attention_forward(self: nn.Module, *inputs, **named) -> tuple[Tensor, None]:
    """Any attention, rotated by our op."""
    return rotated_forward(type(self))(self, *inputs, **named)


def rotated_forward(attention: type[nn.Module]) -> Callable:
    """The forward of a class of attention, with our rotation."""
    if attention not in ROTATED:
        ROTATED[attention] = with_our_rotation(attention.forward)
    return ROTATED[attention]
