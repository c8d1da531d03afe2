"""transformers' decode step compiled by torch.compile over a StaticCache, as its generate() does.

Compilation happens in the first calls, before anything is timed; prompts are not compiled.
"""

import torch
from torch import Tensor

from benchmarks.peers import packages, transformers
from mistral_kernels import Transformer

NAME = "transformers-compiled"
SLOW_ON = ("cpu",)  # minutes of compiling a model
MODE = "reduce-overhead"  # generate()'s default, of transformers.CompileConfig


def missing(device: str) -> str | None:
    place = "transformers:StaticCache"
    absent = packages.missing("transformers", place, needs_cuda=False, device=device)
    return absent or transformers.missing(device)


def model(shape, dtype, device):
    if shape.tokens > 1:
        return "compiles decode only, as generate() does"
    return Engine


class Engine(transformers.Engine):
    """Its model with a compiled forward: on a GPU a CUDA graph, which overwrites its logits."""

    def __init__(self, model: Transformer):
        super().__init__(model)
        self.model.forward = torch.compile(self.model.forward, mode=MODE)

    def logits(self, token: Tensor, cache) -> Tensor:
        return super().logits(token, cache).clone()  # generate() copies them too

    def cache(self, keys_values: Tensor, steps: int):
        from transformers import StaticCache

        room = keys_values.shape[-2] + steps
        return self.filled(StaticCache(config=self.config, max_cache_len=room), keys_values)
