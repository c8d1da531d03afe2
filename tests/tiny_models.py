"""Random models and the ways of feeding them: whole, or piece by piece through a rolling cache."""

from collections.abc import Sequence
from typing import Any

import torch
from checkpoints import native_tensors, parameters_of, tiny_config
from torch import Tensor

from mistral_kernels import Transformer
from mistral_kernels.model.cache import KVCache


def random_model(
    *,
    dtype: torch.dtype = torch.float64,
    max_batch_size: int = 1,
    backend: str = "auto",
    **changes: Any,
) -> Transformer:
    """A tiny model with random weights; `changes` replace fields of `tiny_config`."""
    config = tiny_config(**changes)
    model = Transformer(config, dtype=dtype, max_batch_size=max_batch_size, backend=backend)
    weights = parameters_of(native_tensors(config), config)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    return model


def random_prompts(lengths: Sequence[int], vocab: int = 32, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def feed(
    model: Transformer, cache: KVCache | None, prompts: list[list[int]], seqlens: Sequence[int]
) -> list[Tensor]:
    """One forward call with the next seqlens[b] tokens of each prompt; logits by sequence."""
    done = [0] * len(prompts) if cache is None else cache.lengths
    pieces = [p[at : at + n] for p, at, n in zip(prompts, done, seqlens, strict=True)]
    ids = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
    return list(model.forward(ids, seqlens, cache).split(list(seqlens)))


def feed_all(
    model: Transformer, cache: KVCache, prompts: list[list[int]], schedule: Sequence[Sequence[int]]
) -> list[Tensor]:
    """All calls of a schedule (rows: calls, columns: sequences); all logits by sequence."""
    calls = [feed(model, cache, prompts, seqlens) for seqlens in schedule]
    return [torch.cat(parts) for parts in zip(*calls, strict=True)]


def poison(cache: KVCache) -> KVCache:
    """Fills every slot with NaN, as a fresh torch.empty may."""
    for layer in cache.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    return cache


def shuffle_pages(cache: KVCache, seed: int = 2) -> KVCache:
    """Deals every layer's pages to the sequences in random order."""
    generator = torch.Generator().manual_seed(seed)
    for layer in cache.layers:
        table = layer.block_table
        order = torch.randperm(table.numel(), generator=generator)
        table.copy_(table.flatten()[order].view_as(table))
    return cache
