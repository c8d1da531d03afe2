"""Decode of whole models in few bits, against the same model in full.

One token after 2048 (on a GPU 512), as in `bench_model`; all projections are in few bits,
embeddings, norms and router are not. Weights are random, so the two sides agree on speed only and
are not compared.
"""

from typing import NamedTuple

from benchmarks.bench_model import (
    GPU_SIZES,
    ROUNDS,
    SIZES,
    STEPS,
    TINY,
    decode_contest,
    random_model,
    work_of,
)
from benchmarks.low_bit_weights import FORMATS, group_of
from benchmarks.timing import OURS
from mistral_kernels.model.random_weights import in_few_bits

OP = "low_bit_model"


class Shape(NamedTuple):
    context: int  # tokens in the cache
    tokens: int
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    experts: int
    vocab: int
    window: int
    format: str


def shapes(sizes: dict[str, tuple], context: int) -> dict[str, Shape]:
    return {
        f"{name}-{form}-decode": Shape(context, 1, *size, form)
        for name, size in sizes.items()
        for form in FORMATS
    }


SHAPES = {"tiny": shapes(TINY, 40), "cpu": shapes(SIZES, 2048)}
SHAPES["cuda"] = shapes(GPU_SIZES, 512)


def test_low_bit_model(bench, device, shape, dtype):
    full = random_model(shape, dtype, device)
    codes, group_size = shape.format.partition("-")[0], group_of(shape.format)["group_size"]
    model = in_few_bits(full, codes, group_size=group_size)
    ours = decode_contest(model, {}, shape)[OURS]
    theirs = decode_contest(full, {}, shape)[OURS]
    work = work_of(model, shape)
    bench(ours, tuple, work, {"full": theirs}, compare=False, rounds=ROUNDS, steps=STEPS)
