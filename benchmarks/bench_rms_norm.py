"""rms_norm: bound by memory. Mistral 7B's hidden size, one token to a long prompt."""

from typing import NamedTuple

import torch

from benchmarks.timing import Work
from mistral_kernels import ops

OP = "rms_norm"
EPS = 1e-5


class Shape(NamedTuple):
    tokens: int
    hidden: int


SHAPES = {
    "tiny": {"tiny-3": Shape(3, 40)},
    "cpu": {
        "7b-1": Shape(1, 4096),
        "7b-128": Shape(128, 4096),
        "small-2048": Shape(2048, 1024),
    },
    "cuda": {"7b-1": Shape(1, 4096), "7b-32": Shape(32, 4096), "7b-16k": Shape(16384, 4096)},
}


def test_rms_norm(bench, peers, device, shape, dtype, backend):
    tokens, hidden = shape
    kind = {"dtype": dtype, "device": device}

    def inputs():
        return torch.randn(tokens, hidden, **kind), torch.randn(hidden, **kind), EPS

    def run(x, weight, eps):
        return ops.rms_norm(x, weight, eps, backend=backend)

    moved = (2 * tokens + 1) * hidden * dtype.itemsize
    work = Work(bytes=moved, flops=4 * tokens * hidden, writes=True)
    bench(run, inputs, work, peers)
