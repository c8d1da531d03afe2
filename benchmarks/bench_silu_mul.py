"""silu_mul: bound by memory. The feed-forward width of Mistral 7B, one token to a long prompt."""

import torch
from torch.nn import functional

from benchmarks.timing import DTYPES, Work, grid, measure
from mistral_kernels import ops

# (tokens, ffn_dim)
SHAPES = {
    "cpu": {"7b-1": (1, 14336), "7b-128": (128, 14336), "small-2048": (2048, 3584)},
    "cuda": {"7b-1": (1, 14336), "7b-32": (32, 14336), "7b-16k": (16384, 14336)},
}


@grid("silu_mul", SHAPES)
def test_silu_mul(benchmark, device, backend, shape):
    tokens, ffn_dim = shape
    dtype = DTYPES[device]

    def inputs():
        return (torch.randn(tokens, 2 * ffn_dim, dtype=dtype, device=device),)

    def run(gate_up):
        if backend == "torch":
            gate, up = gate_up.chunk(2, -1)
            return functional.silu(gate) * up
        return ops.silu_mul(gate_up, backend=backend)

    work = Work(bytes=3 * tokens * ffn_dim * dtype.itemsize, flops=5 * tokens * ffn_dim)
    measure(benchmark, run, inputs, work)
