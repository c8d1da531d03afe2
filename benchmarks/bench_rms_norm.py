"""rms_norm: bound by memory. Mistral 7B's hidden size, one token to a long prompt."""

import torch
from torch.nn import functional

from benchmarks.timing import DTYPES, Work, grid, measure
from mistral_kernels import ops

# (tokens, hidden)
SHAPES = {
    "cpu": {"7b-1": (1, 4096), "7b-128": (128, 4096), "small-2048": (2048, 1024)},
    "cuda": {"7b-1": (1, 4096), "7b-32": (32, 4096), "7b-16k": (16384, 4096)},
}
EPS = 1e-5


@grid("rms_norm", SHAPES)
def test_rms_norm(benchmark, device, backend, shape):
    tokens, hidden = shape
    kind = {"dtype": DTYPES[device], "device": device}

    def inputs():
        return torch.randn(tokens, hidden, **kind), torch.randn(hidden, **kind)

    def run(x, weight):
        if backend == "torch":
            return functional.rms_norm(x, (hidden,), weight, EPS)
        return ops.rms_norm(x, weight, EPS, backend=backend)

    itemsize = kind["dtype"].itemsize
    work = Work(bytes=(2 * tokens + 1) * hidden * itemsize, flops=4 * tokens * hidden)
    measure(benchmark, run, inputs, work)
