"""linear_low_bit: bound by reading the codes at decode, by the matrix units at prefill."""

from typing import NamedTuple

import torch

from benchmarks.low_bit_weights import group_of, random_weight, weight_bytes
from benchmarks.peers.torch_low_bit import packed
from benchmarks.timing import Work
from mistral_kernels import ops

OP = "linear_low_bit"


class Shape(NamedTuple):
    tokens: int
    in_dim: int
    out_dim: int
    format: str


def shapes(name: str, in_dim: int, out_dim: int, *tokens: int) -> dict[str, Shape]:
    return {
        f"{name}-{kind}-{rows}": Shape(rows, in_dim, out_dim, kind)
        for kind in ("int4-g128", "int8", "fp8")
        for rows in tokens
    }


SHAPES = {
    "tiny": shapes("tiny", 128, 48, 1, 9),
    "cpu": shapes("small-w13", 1024, 7168, 1, 8, 512),
    "cuda": shapes("7b-w1", 4096, 14336, 1, 4, 16, 64, 4096),
}


def test_linear_low_bit(bench, peers, device, shape, dtype, backend):
    tokens, in_dim, out_dim, name = shape
    how = group_of(name)

    def inputs():
        x = torch.randn(tokens, in_dim, dtype=dtype, device=device)
        weight = random_weight((out_dim, in_dim), name, dtype, device)
        return x, *weight, weight.dequantise(dtype), packed(weight, dtype)

    def run(x, qweight, scales, zeros, perm, *_):
        return ops.linear_low_bit(x, qweight, scales, zeros, perm=perm, **how, backend=backend)

    moved = tokens * (in_dim + out_dim) * dtype.itemsize + weight_bytes(
        out_dim, in_dim, name, dtype
    )
    work = Work(bytes=moved, flops=2 * tokens * in_dim * out_dim)
    bench(run, inputs, work, peers, cold=True)
