"""silu_mul: bound by memory. The feed-forward width of Mistral 7B, one token to a long prompt."""

from typing import NamedTuple

import torch

from benchmarks.timing import Work
from mistral_kernels import ops

OP = "silu_mul"


class Shape(NamedTuple):
    tokens: int
    ffn_dim: int


SHAPES = {
    "tiny": {"tiny-3": Shape(3, 40)},
    "cpu": {
        "7b-1": Shape(1, 14336),
        "7b-128": Shape(128, 14336),
        "small-2048": Shape(2048, 3584),
    },
    "cuda": {"7b-1": Shape(1, 14336), "7b-32": Shape(32, 14336), "7b-16k": Shape(16384, 14336)},
}


def test_silu_mul(bench, peers, device, shape, dtype, backend):
    tokens, ffn_dim = shape

    def inputs():
        return (torch.randn(tokens, 2 * ffn_dim, dtype=dtype, device=device),)

    def run(gate_up):
        return ops.silu_mul(gate_up, backend=backend)

    elements = tokens * ffn_dim
    work = Work(bytes=3 * elements * dtype.itemsize, flops=5 * elements, writes=True)
    bench(run, inputs, work, peers)
