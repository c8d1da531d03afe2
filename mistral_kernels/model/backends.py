"""Which backend serves each op of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.ops import dispatch


def choose_backends(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    low_bit: Mapping[str, LowBitForm] | None = None,
) -> dict[str, str]:
    """Tells what serves each op of a model.

    Args:
        config: the model.
        device, dtype: of its parameters.
        backend: a preference: an op without that backend takes what "auto" chooses.
        low_bit: name to form of the weights in few bits.

    Returns:
        op -> backend, for the ops that such a model uses; "auto" where it depends on the weight.

    Raises:
        ValueError: no such backend.
    """
    found = op_backends(config, device=device, dtype=dtype, backend=backend, low_bit=low_bit)
    return {op: names.pop() if len(names) == 1 else "auto" for op, names in found.items()}


def op_backends(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    low_bit: Mapping[str, LowBitForm] | None = None,
) -> dict[str, set[str]]:
    """Tells all that serve each op of a model, one for each kind of weights; as `choose_backends`.

    Raises:
        ValueError: no such backend.
    """
    if backend not in ("auto", *dispatch.BACKENDS):
        raise ValueError(
            f"Transformer: backend must be 'auto' or one of {dispatch.BACKENDS}, got {backend!r}"
        )
    call = _call(config, device, dtype)
    feed_forward = ["route_experts"] if config.experts else ["silu_mul"]
    weights = _low_bit_facts(config, low_bit or {})
    in_full = config.layers - sum(name.endswith(".w13") for name in low_bit or ())
    if config.experts and in_full:
        feed_forward.append("expert_mlp")
    attention = ("rope_", "store_kv_", "prefill_attention", "decode_attention")
    ops = ("rms_norm", "add_rms_norm", "linear", *attention, *feed_forward)
    found = {op: {dispatch.prefer(op, **call, backend=backend)} for op in ops}
    for op, facts in weights:
        call["facts"] = facts
        found.setdefault(op, set()).add(dispatch.prefer(op, **call, backend=backend))
    return found


def _low_bit_facts(
    config: ModelConfig, low_bit: Mapping[str, LowBitForm]
) -> list[tuple[str, dispatch.Facts]]:
    """The low-bit ops that a model uses, once for each kind of weights, and what they ask."""
    found: dict[tuple[str, dispatch.Facts], None] = {}
    for name, form in low_bit.items():
        facts = (("bits", form.bits), ("group_size", form.group_size))
        if not config.experts or ".attention." in name:
            found["linear_low_bit", facts] = None
        elif name.endswith(".w13"):
            down = low_bit[name.removesuffix("w13") + "w2"]
            sizes = (("experts", config.experts), ("top_k", config.top_k), *facts)
            found["expert_mlp_low_bit", (*sizes, ("w2_group_size", down.group_size))] = None
    return list(found)


def decode_backend(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, backend: str, page_size: int
) -> str:
    """Tells what serves decode_attention on a cache with pages of `page_size` slots.

    Raises:
        ValueError: `backend` is one that serves such a model, but not such pages.
    """
    call = _call(config, device, dtype)
    # A preference where it cannot serve the model at all, but a page_size is asked for, too.
    named = dispatch.prefer("decode_attention", **call, backend=backend) == backend
    choose = dispatch.choose if named else dispatch.prefer
    call["facts"] += (("page_size", page_size),)
    return choose("decode_attention", **call, backend=backend)


def _call(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict:
    """What `choose` wants to know of any call of a model."""
    return {
        "device_type": device.type,
        "capability": dispatch.device_capability(device),
        "dtype": dtype,
        "facts": (
            ("group", config.q_heads // config.kv_heads),
            ("head_dim", config.head_dim),
            ("hidden", config.hidden),
        ),
    }
