"""Decode of whole models in few bits, against the same model in full.

One token after 2048, as in `bench_model`; all projections are in few bits, embeddings, norms and
router are not. Weights are random, so the two sides agree on speed only and are not compared.
"""

from math import prod
from typing import NamedTuple

from benchmarks.bench_model import ROUNDS, SIZES, STEPS, TINY, decode_contest, random_model, work_of
from benchmarks.low_bit_weights import FORMATS
from benchmarks.timing import OURS, Work
from mistral_kernels import Transformer
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.weight_table import parameter_shapes
from mistral_kernels.ops.low_bit import quantise

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


SHAPES = {"tiny": shapes(TINY, 40), "cpu": shapes(SIZES, 2048), "cuda": {}}


def in_few_bits(full: Transformer, name: str) -> tuple[Transformer, dict[str, LowBitForm]]:
    """The same model with its projections rounded, and their forms."""
    codes, group_size = FORMATS[name]
    forms = {}
    for weight, size in parameter_shapes(full.config).items():
        if weight.endswith(("wqkv", "wo", "w13", "w2")):
            columns = size[-1]
            group = columns if group_size is None else min(group_size, columns)
            forms[weight] = LowBitForm(codes, group, full.dtype, zeros=False, perm=False)
    model = Transformer(full.config, device="cpu", dtype=full.dtype, low_bit=forms)
    for weight, value in full.named_parameters():
        if weight in forms:
            low = quantise(value, codes, forms[weight].group_size)
            for kept, tensor in zip(model.get_submodule(weight).tensors, low, strict=True):
                if kept is not None:
                    kept.copy_(tensor)
        else:
            model.get_parameter(weight).data.copy_(value)
    return model, forms


def bytes_read(model: Transformer, forms: dict[str, LowBitForm]) -> int:
    """Of the weights, by one token."""
    config, total = model.config, 0
    for name, size in parameter_shapes(config).items():
        if name == "tok_embeddings":
            continue  # a row
        share = config.top_k / config.experts if config.experts and len(size) == 3 else 1
        full = prod(size) * model.dtype.itemsize
        total += int((forms[name].nbytes(size) if name in forms else full) * share)
    return total


def test_low_bit_model(bench, shape, dtype):
    full = random_model(shape, dtype)
    model, forms = in_few_bits(full, shape.format)
    ours = decode_contest(model, None, shape)[OURS]
    theirs = decode_contest(full, None, shape)[OURS]
    work = Work(bytes_read(model, forms), work_of(full.config, shape, dtype).flops)
    bench(ours, tuple, work, {"full": theirs}, compare=False, rounds=ROUNDS, steps=STEPS)
