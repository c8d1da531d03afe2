"""linear: bound by reading the weight at decode, by the tensor cores at prefill."""

import torch
from torch.nn import functional

from benchmarks.timing import DTYPES, Work, grid, measure
from mistral_kernels import ops

# (tokens, in, out): Mistral 7B's qkv and gate-up projections, and those of a small model.
SHAPES = {
    "cpu": {
        "small-qkv-1": (1, 1024, 1536),
        "small-w13-1": (1, 1024, 7168),
        "7b-qkv-1": (1, 4096, 6144),
        "small-w13-8": (8, 1024, 7168),
        "small-w13-512": (512, 1024, 7168),
    },
    "cuda": {
        "7b-qkv-1": (1, 4096, 6144),
        "7b-w13-1": (1, 4096, 28672),
        "7b-w13-8": (8, 4096, 28672),
        "7b-w13-4096": (4096, 4096, 28672),
    },
}


@grid("linear", SHAPES)
def test_linear(benchmark, device, backend, shape):
    tokens, in_dim, out_dim = shape
    kind = {"dtype": DTYPES[device], "device": device}

    def inputs():
        return torch.randn(tokens, in_dim, **kind), torch.randn(out_dim, in_dim, **kind)

    def run(x, weight):
        if backend == "torch":
            return functional.linear(x, weight)
        return ops.linear(x, weight, backend=backend)

    moved = tokens * (in_dim + out_dim) + in_dim * out_dim
    work = Work(bytes=moved * kind["dtype"].itemsize, flops=2 * tokens * in_dim * out_dim)
    measure(benchmark, run, inputs, work)
