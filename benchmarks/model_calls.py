"""Calls of a whole model that cost the same each time: whole prompts, and decode steps."""

from collections.abc import Callable

import torch

from mistral_kernels import Transformer
from mistral_kernels.model.cache import KVCache


def whole_prompts(model: Transformer, batch: int, tokens: int) -> Callable[[], torch.Tensor]:
    """Return a call that feeds `batch` random prompts of `tokens` to a new cache.

    Its result is the logits of their last tokens, (batch, vocab).
    """
    prompts = torch.randint(model.config.vocab, (batch * tokens,), device=model.device)
    seqlens = [tokens] * batch
    return lambda: model.forward(prompts, seqlens, model.new_cache(batch, tokens), last_only=True)


def used_cache(model: Transformer, batch: int, context: int, room: int) -> KVCache:
    """Return a cache as `context` tokens of each sequence leave it, with room for `room` more.

    Keys and values are zeros, which are read like any others; `room` tokens can be rolled back.
    """
    cache = model.new_cache(batch, context + room, lookahead=room)
    for layer in cache.layers:
        layer.k.zero_()
        layer.v.zero_()
    cache.advance([context] * batch)
    return cache


def decode_steps(model: Transformer, cache: KVCache, steps: int) -> Callable[[], torch.Tensor]:
    """Return a call that feeds each sequence `steps` random tokens, one by one, and forgets them.

    Its result is the last step's logits, (batch, vocab). The cache has room for `steps` tokens.
    """
    shape = (steps, cache.batch)
    tokens = torch.randint(model.config.vocab, shape, device=model.device)
    one_each = [1] * cache.batch

    def call() -> torch.Tensor:
        for row in tokens:
            logits = model.forward(row, one_each, cache)
        cache.rollback(steps)
        return logits

    return call
