"""The published headlines of these models, both sides in this engine.

- attention-16k, prefill-16k: window 4096 against no window at 16k tokens, attention alone and the
  whole prefill. The paper of Mistral 7B claims "a speed improvement of 2x".
- cache-32k: bytes of a whole model's caches at 32k tokens, ring of 4096 against all: 1/8 there.
  Times of that row are those of one new token's attention in one layer of either.
- mixtral-decode: Mixtral 8x7B against Llama 2 70B, a token after 512: "6x faster inference".

Weights and keys are random or zero: no time depends on them but by the choice of experts. On the
CPU models are shrunk: for attention and prefill widths and heads of Mistral 7B by 8 (heads of 128
in groups of 4 as there) and to one layer; for decode widths, heads and vocabulary of both by 4 and
layers by 8, to 0.38 and 0.57 billion weights. A GPU gets the real shapes, for decode a quarter of
the layers of both.

A row's `ours` is our figure for what is `published`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.bench_model import config_of
from benchmarks.model_calls import decode_steps, read_prompts, used_cache
from benchmarks.timing import Work
from mistral_kernels import Transformer, ops
from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.random_weights import random_model
from mistral_kernels.model.step_work import step_work, visible_pairs

OP = "headlines"
STEPS = 8  # of a timed decode call
ROUNDS = 3
FULL, DENSE = "no window", "dense"  # what a headline compares with
PAPER = "Jiang et al. 2023, arXiv 2310.06825"
PUBLISHED = {  # times faster; of the cache a share
    "attention": (2, PAPER),
    "prefill": (2, PAPER),
    "cache": (1 / 8, PAPER),
    "mixtral": (6, "Mistral AI, Mixtral of experts, 11 December 2023"),
}


class Shape(NamedTuple):
    tokens: int  # of the prompt, or in the cache
    window: int | None
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    experts: int
    vocab: int


MISTRAL_7B = (32, 4096, 32, 8, 128, 14336, 0, 32000)  # layers .. vocab of Shape
SHRUNK_7B = (1, 512, 4, 1, 128, 1792, 0, 4000)
TINY = Shape(40, 8, 2, 32, 4, 2, 16, 48, 0, 64)
SHAPES = {
    "tiny": {
        **dict.fromkeys(("attention-40", "prefill-40", "cache-40"), TINY),
        "mixtral-decode": TINY._replace(window=None, experts=4),
    },
    "cpu": {
        "attention-16k": Shape(16384, 4096, *SHRUNK_7B),
        "prefill-16k": Shape(16384, 4096, *SHRUNK_7B),
        "cache-32k": Shape(32768, 4096, *MISTRAL_7B),
        "mixtral-decode": Shape(512, None, 4, 1024, 8, 2, 128, 3584, 8, 8000),
    },
    "cuda": {
        "attention-16k": Shape(16384, 4096, *MISTRAL_7B),
        "prefill-16k": Shape(16384, 4096, *MISTRAL_7B),
        "cache-32k": Shape(32768, 4096, *MISTRAL_7B),
        "mixtral-decode": Shape(512, None, 8, 4096, 32, 8, 128, 14336, 8, 32000),
    },
}


def test_headlines(bench, device, case, shape, dtype):
    name = case.split("-")[0]
    if device == "cpu" and dtype != torch.float32 and name in ("attention", "prefill"):
        pytest.skip("long prompts run in float32 on the CPU")
    row = MEASURES[name](bench, shape, {"device": torch.device(device), "dtype": dtype})
    row["published"], row["source"] = PUBLISHED[name]
    if "ours" not in row and "peers" in row:  # without peers nothing was timed
        (rival,) = row["peers"].values()
        row["ours"] = rival["ratio"]


def without_window(config: ModelConfig) -> ModelConfig:
    return replace(config, windows=(None,) * config.layers)


def attention(bench, shape: Shape, place: dict[str, Any]) -> dict[str, Any]:
    tokens, window, q_heads, head_dim = shape.tokens, shape.window, shape.q_heads, shape.head_dim
    heads = q_heads, shape.kv_heads, shape.kv_heads
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=place["device"])

    def inputs() -> tuple[torch.Tensor, ...]:
        return torch.randn(tokens, sum(heads), head_dim, **place).split(heads, 1)

    def attend(width: int | None) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: ops.prefill_attention(q, k, v, ends, window=width)[0]

    pairs = visible_pairs(0, tokens, window)
    moved = tokens * (q_heads + sum(heads)) * head_dim * place["dtype"].itemsize
    work = Work(bytes=moved, flops=4 * pairs * q_heads * head_dim)
    return bench(attend(window), inputs, work, {FULL: attend(None)}, compare=False, rounds=ROUNDS)


def prefill(bench, shape: Shape, place: dict[str, Any]) -> dict[str, Any]:
    config = config_of(shape)
    models = [random_model(config, **place) for config in (config, without_window(config))]
    ours, theirs = (read_prompts(model, 1, shape.tokens) for model in models)
    work = Work(*step_work(config, dtype=place["dtype"], context=0, tokens=shape.tokens))
    return bench(ours, tuple, work, {FULL: theirs}, compare=False, rounds=ROUNDS)


def cache(bench, shape: Shape, place: dict[str, Any]) -> dict[str, Any]:
    config = config_of(shape)
    configs = config, without_window(config)
    # Only the pages of one layer are ever touched: the rest is as large, and takes no memory.
    ring, full = (KVCache(config, 1, shape.tokens, **place) for config in configs)
    last = torch.tensor([shape.tokens - 1], dtype=torch.int32, device=place["device"])
    heads = shape.q_heads, shape.kv_heads, shape.kv_heads
    q, k, v = torch.randn(1, sum(heads), shape.head_dim, **place).split(heads, 1)

    def attend(of: KVCache) -> Callable[[], torch.Tensor]:
        layer = of.layers[0]
        for part in (layer.k, layer.v):
            part.zero_()
        where, how = (*layer[:3], last), {"window": layer.window, "workspace": layer.workspace}
        return lambda: ops.decode_attention(q, k, v, *where, **how)[0]

    seen = min(shape.window, shape.tokens) * shape.head_dim
    moved = 2 * seen * shape.kv_heads * place["dtype"].itemsize
    work = Work(bytes=moved, flops=4 * seen * shape.q_heads)
    row = bench(attend(ring), tuple, work, {FULL: attend(full)}, compare=False)
    row["cache_bytes"], row["full_cache_bytes"] = ring.nbytes, full.nbytes
    row["ours"] = ring.nbytes / full.nbytes
    return row


def mixtral(bench, shape: Shape, place: dict[str, Any]) -> dict[str, Any]:
    config = config_of(shape)
    # From Mixtral 8x7B to Llama 2 70B: widths 4096 to 8192 and 14336 to 28672, 32 to 64 heads of
    # queries on as many of keys, 32 to 80 layers.
    twice = {name: 2 * getattr(config, name) for name in ("hidden", "q_heads", "ffn_dim")}
    layers = config.layers * 5 // 2
    dense = replace(config, **twice, layers=layers, windows=(None,) * layers, experts=0, top_k=0)

    def steps(model: Transformer) -> Callable[[], torch.Tensor]:
        return decode_steps(model, used_cache(model, 1, shape.tokens, STEPS), STEPS)

    models = [random_model(config, **place) for config in (config, dense)]
    ours, theirs = map(steps, models)
    work = Work(*step_work(config, dtype=place["dtype"], context=shape.tokens))
    how = {"compare": False, "rounds": ROUNDS, "steps": STEPS}
    row = bench(ours, tuple, work, {DENSE: theirs}, **how)
    row["parameters"], row["dense_parameters"] = (model.num_parameters() for model in models)
    return row


MEASURES = {"attention": attention, "prefill": prefill, "cache": cache, "mixtral": mixtral}
