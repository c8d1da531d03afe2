"""linear: bound by reading the weight at decode, by the matrix units at prefill."""

from typing import NamedTuple

import torch

from benchmarks.timing import Work
from mistral_kernels import ops

OP = "linear"


class Shape(NamedTuple):
    tokens: int
    in_dim: int
    out_dim: int


# The qkv and gate-up projections of Mistral 7B and of a small model.
SHAPES = {
    "tiny": {"tiny-1": Shape(1, 48, 40), "tiny-9": Shape(9, 48, 40)},
    "cpu": {
        "small-qkv-1": Shape(1, 1024, 1536),
        "small-w13-1": Shape(1, 1024, 7168),
        "7b-qkv-1": Shape(1, 4096, 6144),
        "small-w13-8": Shape(8, 1024, 7168),
        "small-w13-512": Shape(512, 1024, 7168),
    },
    "cuda": {
        "7b-qkv-1": Shape(1, 4096, 6144),
        "7b-w13-1": Shape(1, 4096, 28672),
        "7b-w13-8": Shape(8, 4096, 28672),
        "7b-w13-4096": Shape(4096, 4096, 28672),
    },
}
QUICK = ("small-w13-1", "small-w13-8", "7b-qkv-1")


def test_linear(bench, peers, device, shape, dtype, backend):
    tokens, in_dim, out_dim = shape
    kind = {"dtype": dtype, "device": device}

    def inputs():
        return torch.randn(tokens, in_dim, **kind), torch.randn(out_dim, in_dim, **kind)

    def run(x, weight):
        return ops.linear(x, weight, backend=backend)

    moved = tokens * (in_dim + out_dim) + in_dim * out_dim
    work = Work(bytes=moved * dtype.itemsize, flops=2 * tokens * in_dim * out_dim)
    bench(run, inputs, work, peers, cold=True)
