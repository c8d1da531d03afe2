"""add_rms_norm: bound by memory; beside the norm it adds the residual stream and keeps the sum."""

import torch

from benchmarks.bench_rms_norm import EPS, SHAPES, Shape
from benchmarks.timing import Work
from mistral_kernels import ops

__all__ = ["SHAPES", "Shape"]  # of the norm alone

OP = "add_rms_norm"


def test_add_rms_norm(bench, peers, device, shape, dtype, backend):
    tokens, hidden = shape
    kind = {"dtype": dtype, "device": device}

    def inputs():
        x, residual = torch.randn(2, tokens, hidden, **kind)
        return x, residual, torch.randn(hidden, **kind), EPS

    def run(x, residual, weight, eps):
        return ops.add_rms_norm(x, residual, weight, eps, backend=backend)[0]

    moved = (4 * tokens + 1) * hidden * dtype.itemsize
    work = Work(bytes=moved, flops=5 * tokens * hidden, writes=True)
    bench(run, inputs, work, peers)
