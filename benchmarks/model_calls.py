"""Calls of a whole model that cost the same each time: prompts, and decode steps."""

from collections.abc import Callable

import torch

from mistral_kernels import Transformer, generate
from mistral_kernels.model.cache import KVCache


def read_prompts(model: Transformer, batch: int, tokens: int) -> Callable[[], torch.Tensor]:
    """Return a call that reads `batch` random prompts of `tokens` as `generate` does by itself.

    It draws one token of each; its result is their logprobs, (batch, 1). The model takes `batch`
    sequences at once.
    """
    prompts = torch.randint(model.config.vocab, (batch, tokens)).tolist()
    return lambda: torch.tensor(generate(prompts, model, max_tokens=1)[1])


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
    """Return a call in which `generate` feeds each sequence `steps` tokens, and forgets them.

    The first is random. The result is the logprobs of what was drawn, (batch, steps). The cache has
    room for `steps` tokens.
    """
    prompts = torch.randint(model.config.vocab, (cache.batch, 1)).tolist()

    def call() -> torch.Tensor:
        logprobs = generate(prompts, model, max_tokens=steps, cache=cache)[1]
        cache.rollback(steps)
        return torch.tensor(logprobs)

    return call
