"""Which backend serves each op of a model."""

from __future__ import annotations

import torch

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.ops import dispatch


def choose_backends(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, backend: str = "auto"
) -> dict[str, str]:
    """Tells what serves each op of a model.

    Args:
        config: the model.
        device, dtype: of its parameters.
        backend: a preference: an op without that backend takes what "auto" chooses.

    Returns:
        op -> backend, for the ops that such a model uses.

    Raises:
        ValueError: no such backend.
    """
    if backend not in ("auto", *dispatch.BACKENDS):
        raise ValueError(
            f"Transformer: backend must be 'auto' or one of {dispatch.BACKENDS}, got {backend!r}"
        )
    call = _call(config, device, dtype)
    feed_forward = ("route_experts", "expert_mlp") if config.experts else ("silu_mul",)
    attention = ("rope_", "store_kv_", "prefill_attention", "decode_attention")
    ops = ("rms_norm", "add_rms_norm", "linear", *attention, *feed_forward)
    return {op: dispatch.prefer(op, **call, backend=backend) for op in ops}


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
