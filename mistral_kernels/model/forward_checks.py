"""What the arguments of `Transformer.forward` must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_kernels.model.cache import KVCache
from mistral_kernels.ops.checks import is_int

if TYPE_CHECKING:
    from mistral_kernels.model.transformer import Transformer


def check_inputs(
    input_ids: Tensor, seqlens: Sequence[int], cache: KVCache | None, model: Transformer
) -> list[int]:
    """Checks the arguments of `Transformer.forward`, whose errors it raises; returns seqlens."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"forward: input_ids must be an int32 or int64 tensor, got {got}")
    if input_ids.dim() != 1:
        raise ValueError(
            f"forward: input_ids must have shape (tokens,), got {tuple(input_ids.shape)}"
        )
    if isinstance(seqlens, Tensor):
        seqlens = seqlens.tolist()
    if not isinstance(seqlens, Sequence) or not all(map(is_int, seqlens)):
        raise TypeError(f"forward: seqlens must be a list of ints, got {seqlens!r}")
    seqlens = list(seqlens)
    if any(n < 0 for n in seqlens) or sum(seqlens) != len(input_ids):
        raise ValueError(
            f"forward: seqlens must be >= 0 and sum to the {len(input_ids)} input_ids,"
            f" got {seqlens}"
        )
    # On a GPU this would wait for the device; `generate` checks prompts while they are lists.
    if input_ids.device.type == "cpu" and len(input_ids):
        ids = input_ids.tolist()
        low, high = min(ids), max(ids)
        if low < 0 or high >= model.config.vocab:
            raise ValueError(
                f"forward: input_ids must be in [0, {model.config.vocab}),"
                f" got {low if low < 0 else high}"
            )
    if cache is not None:
        check_cache(cache, model, "forward")
        if len(seqlens) != cache.batch:
            raise ValueError(
                f"forward: seqlens must have the cache's {cache.batch} entries, got {len(seqlens)}"
            )
        cache.check_room(seqlens)
    return seqlens


def check_cache(cache: KVCache, model: Transformer, name: str) -> None:
    """Checks that a cache is one of the model's; `name` stands in front of the error."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"{name}: cache must be a KVCache, got {type(cache).__name__}")
    if (cache.config, cache.device, cache.dtype) != (model.config, model.device, model.dtype):
        raise ValueError(
            f"{name}: cache must come from this model's new_cache, got one in {cache.dtype} on"
            f" {cache.device} for {cache.config}"
        )
