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
    facts = (
        ("group", config.q_heads // config.kv_heads),
        ("head_dim", config.head_dim),
        ("hidden", config.hidden),
    )
    feed_forward = ("route_experts", "expert_mlp") if config.experts else ("silu_mul",)
    attention = ("rope_", "store_kv_", "prefill_attention", "decode_attention")
    return {
        op: dispatch.prefer(
            op,
            device_type=device.type,
            capability=dispatch.device_capability(device),
            dtype=dtype,
            facts=facts,
            backend=backend,
        )
        for op in ("rms_norm", "add_rms_norm", "linear", *attention, *feed_forward)
    }
