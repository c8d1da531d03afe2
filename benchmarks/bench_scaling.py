"""Time and memory of prefill and decode over tokens, batch and experts; `growth` fits exponents.

Small models with random weights, a window of 512 in every layer, so that 128k tokens take seconds:
DENSE has 1M weights a layer, an expert of MIXTURE 2.8M. Prompts are read as `generate` does; a
decode step goes on from a full ring. `memory_bytes` is what a prefill takes at its peak beyond the
weights, its cache included; of decode it is the cache.

In float32 on the CPU only: growth is that of the work, which has no dtype.
"""

from typing import NamedTuple

import pytest
import torch

from benchmarks.bench_model import config_of
from benchmarks.model_calls import decode_steps, read_prompts, used_cache
from benchmarks.timing import Work
from mistral_kernels.model.random_weights import random_model
from mistral_kernels.model.step_work import step_work
from mistral_kernels.peak_memory import peak_bytes

OP = "scaling"
STEPS = 8  # of a timed decode call
LONG_TOKENS, LONG_ROUNDS = 1 << 15, 3  # of all prompts of a call


class Shape(NamedTuple):
    context: int  # tokens in the cache
    tokens: int  # of a prompt; 1: decode
    batch: int
    experts: int
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab: int
    window: int


# layers .. window of Shape
DENSE = (2, 256, 4, 1, 64, 1024, 1024, 512)
MIXTURE = (2, 512, 8, 2, 64, 1792, 1024, 512)
TINY = (1, 32, 2, 1, 16, 48, 64, 8)


def shapes(dense: tuple, mixture: tuple, lengths, batches, experts) -> dict[str, Shape]:
    """Return the cases of both phases over the three sizes."""
    found = {}
    for n in lengths:
        found[f"prefill-tokens-{n}"] = Shape(0, n, 1, 0, *dense)
        found[f"decode-tokens-{n}"] = Shape(n, 1, 1, 0, *dense)
    for n in batches:
        found[f"prefill-batch-{n}"] = Shape(0, 128, n, 0, *dense)
        found[f"decode-batch-{n}"] = Shape(1024, 1, n, 0, *dense)
    for n in experts:
        found[f"prefill-experts-{n}"] = Shape(0, 512, 1, n, *mixture)
        found[f"decode-experts-{n}"] = Shape(1024, 1, 1, n, *mixture)
    return found


SIZES = [1024 << i for i in range(8)], [1, 4, 16, 64, 256], [2, 4, 8, 16, 32, 64]
SHAPES = {
    "tiny": shapes(TINY, TINY, [24], [3], [4]),
    "cpu": shapes(DENSE, MIXTURE, *SIZES),
    "cuda": shapes(DENSE, MIXTURE, *SIZES),
}


def test_scaling(bench, device, shape, dtype):
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("growth is fitted in float32")
    place = {"dtype": dtype, "device": device}
    model = random_model(config_of(shape), **place, max_batch_size=shape.batch)
    size = {"context": shape.context, "tokens": shape.tokens, "batch": shape.batch}
    work = Work(*step_work(model.config, dtype=dtype, **size))
    if shape.tokens == 1:
        cache = used_cache(model, shape.batch, shape.context, STEPS)
        call = decode_steps(model, cache, STEPS)
        row = bench(call, tuple, work, {}, steps=STEPS)
        row["memory_bytes"] = cache.nbytes
        return
    call = read_prompts(model, shape.batch, shape.tokens)
    rounds = LONG_ROUNDS if shape.batch * shape.tokens >= LONG_TOKENS else None
    row = bench(call, tuple, work, {}, rounds=rounds)
    row["memory_bytes"] = peak_bytes(call, torch.device(device))
