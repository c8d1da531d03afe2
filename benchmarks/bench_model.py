"""The whole model against transformers with its defaults, on the same weights and tokens.

Decode: the time of one token after 2048, of calls that feed 8. Prefill: a whole prompt into a new
cache, logits of its last token, on both sides. Weights are random, as are the keys and values of
the 2048 tokens: no step of either side depends on their values, except for the choice of experts,
and both get the same. The logits of both are compared before anything is timed (of the mixture in
float32 only).

Prompts run through `2048 // tokens` of the layers, at least one: layers are alike, and all of them
would take half an hour. For the same reason the longest are called three times, not five, and long
ones run in float32 only. `--sizes full` spares nothing.

On a GPU decode comes after 512 tokens and ours is `generate`; all layers run, of Mixtral 8x7B a
quarter of what it has, so that both sides fit.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch

from benchmarks.model_calls import decode_steps, used_cache
from benchmarks.peers import engine_calls
from benchmarks.timing import OURS, Work
from mistral_kernels import Transformer, ops
from mistral_kernels.model import random_weights
from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.step_work import step_work

OP = "model"
STEPS = 8  # tokens of a timed decode call
ROUNDS = 5
LAYER_TOKENS = 2048  # tokens times layers of a prompt; this and the next: unless --sizes is full
LONG_TOKENS, LONG_ROUNDS = 4096, 3
BF16_TOKENS = (
    512  # longest prompt in bfloat16, which takes thrice the time without its instructions
)

# Columns of a shape that ModelConfig has too.
CONFIG_SIZES = (
    *("layers", "hidden", "q_heads", "kv_heads"),
    *("head_dim", "ffn_dim", "experts", "vocab"),
)


class Shape(NamedTuple):
    context: int  # tokens in the cache
    tokens: int  # of a prompt; 1: decode
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    experts: int
    vocab: int
    window: int


# layers .. window of Shape
SIZES = {
    "dense-180m": (12, 1024, 16, 4, 64, 3584, 0, 8192, 512),
    "mixtral-191m": (8, 512, 8, 4, 64, 1792, 8, 8192, 512),
}
GPU_SIZES = {
    "mistral-7b": (32, 4096, 32, 8, 128, 14336, 0, 32000, 4096),
    "mixtral-8x7b-8-layers": (8, 4096, 32, 8, 128, 14336, 8, 32000, 4096),
}
TINY = {"dense": (2, 32, 4, 2, 16, 64, 0, 64, 8), "mixtral": (2, 32, 4, 2, 16, 64, 4, 64, 8)}


def shapes(sizes: dict[str, tuple], context: int, prompts: tuple[int, ...]) -> dict[str, Shape]:
    """Return decode after `context` tokens and prefill of each of `prompts`, for every size."""
    found = {}
    for name, size in sizes.items():
        found[f"{name}-decode"] = Shape(context, 1, *size)
        found |= {f"{name}-prefill-{tokens}": Shape(0, tokens, *size) for tokens in prompts}
    return found


SHAPES = {
    "tiny": shapes(TINY, 40, (20,)),
    "cpu": shapes(SIZES, 2048, (128, 512, 2048, 8192)),
    "cuda": shapes(GPU_SIZES, 512, (512, 4096, 16384)),
}
QUICK = [f"{name}-{what}" for name in SIZES | GPU_SIZES for what in ("decode", "prefill-512")]


def config_of(shape: NamedTuple) -> ModelConfig:
    """The configuration of which a benchmark's shape has the sizes; one window for all layers."""
    return ModelConfig(
        **{name: getattr(shape, name) for name in CONFIG_SIZES},
        norm_eps=1e-5,
        rope_theta=1e4,
        windows=(shape.window,) * shape.layers,
        top_k=min(2, shape.experts),
        interleaved=False,
    )


def random_model(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Transformer:
    """A model of that shape."""
    return random_weights.random_model(config_of(shape), dtype=dtype, device=device)


def work_of(model: Transformer, shape: Shape) -> Work:
    """Of one token or one prompt."""
    how = {"dtype": model.dtype, "low_bit": model.low_bit}
    work = step_work(model.config, context=shape.context, tokens=shape.tokens, **how)
    return Work(work.bytes, work.flops)


def filled_cache(model: Transformer, keys_values: torch.Tensor, max_tokens: int) -> KVCache:
    """Our cache with what an engine's `cache` puts into theirs."""
    tokens = keys_values.shape[-2]
    cache = model.new_cache(1, max_tokens)
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device=model.device)
    for layer, (k, v) in zip(cache.layers, keys_values[:, :, 0].transpose(2, 3), strict=True):
        ops.store_kv_(k, v, layer.k, layer.v, layer.block_table, offsets, offsets[:1])
    cache.advance([tokens])
    return cache


def test_model(bench, peers, request, device, shape, dtype):
    rounds = ROUNDS
    if device == "cpu" and shape.tokens > 1 and request.config.getoption("sizes") != "full":
        if dtype == torch.bfloat16 and shape.tokens > BF16_TOKENS:
            pytest.skip("a long prompt in bfloat16 runs with --sizes full only")
        shape = shape._replace(layers=max(1, min(shape.layers, LAYER_TOKENS // shape.tokens)))
        rounds = ROUNDS if shape.tokens < LONG_TOKENS else LONG_ROUNDS
    model = random_model(shape, dtype, device)
    contest = decode_contest if shape.tokens == 1 else prefill_contest
    calls = contest(model, peers, shape)
    work = work_of(model, shape)
    steps = STEPS if shape.tokens == 1 else 1
    # Rounding to bf16 may send a token to another expert, and then nothing else is alike; and
    # on a GPU our decode draws its own tokens.
    compare = not shape.experts or dtype == torch.float32
    compare = compare and (device == "cpu" or shape.tokens > 1)
    row = bench(calls.pop(OURS), tuple, work, calls, compare=compare, rounds=rounds, steps=steps)
    row["layers"] = shape.layers


def decode_contest(model: Transformer, theirs: dict[str, Callable], shape: Shape) -> dict:
    """Calls that go on from `context` tokens: rings are full, so each costs the same.

    `theirs`: name -> what makes an engine of our model. On a GPU ours is `generate`, which replays
    graphs and waits for each token as users do.
    """
    heads = (model.config.kv_heads, shape.context, model.config.head_dim)
    keys_values = torch.randn(shape.layers, 2, 1, *heads, device=model.device).to(model.dtype)
    tokens = torch.randint(shape.vocab, (STEPS,), device=model.device)
    steps = STEPS * (ROUNDS + 1)

    def decode() -> torch.Tensor:
        return torch.cat([model.forward(token[None], [1], cache) for token in tokens])

    if model.device.type == "cuda":
        decode = decode_steps(model, used_cache(model, 1, shape.context, STEPS), STEPS)
    else:
        cache = filled_cache(model, keys_values, shape.context + steps)

    def rival(engine) -> Callable[[], torch.Tensor]:
        return partial(engine.decode, tokens, engine.cache(keys_values, steps))

    return {OURS: decode} | engine_calls(model, theirs, rival)


def prefill_contest(model: Transformer, theirs: dict[str, Callable], shape: Shape) -> dict:
    """Calls that feed a whole prompt to a new cache."""
    prompt = torch.randint(shape.vocab, (shape.tokens,), device=model.device)

    def prefill() -> torch.Tensor:
        cache = model.new_cache(1, shape.tokens)
        # cpu(): a GPU has to be waited for.
        return model.forward(prompt, [shape.tokens], cache, last_only=True).cpu()

    rivals = engine_calls(model, theirs, lambda engine: partial(engine.prefill, prompt))
    return {OURS: prefill} | rivals
