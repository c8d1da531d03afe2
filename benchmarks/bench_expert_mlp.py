"""expert_mlp: bound by reading the chosen experts for few tokens, by the matrix units for many."""

from typing import NamedTuple

import torch

from benchmarks.timing import Work
from mistral_kernels import ops

OP = "expert_mlp"


class Shape(NamedTuple):
    tokens: int
    hidden: int
    ffn_dim: int
    experts: int
    top_k: int


SHAPES = {
    "tiny": {"tiny-1": Shape(1, 24, 40, 4, 2), "tiny-9": Shape(9, 24, 40, 4, 2)},
    "cpu": {
        "small-1": Shape(1, 512, 1792, 8, 2),
        "small-8": Shape(8, 512, 1792, 8, 2),
        "small-512": Shape(512, 512, 1792, 8, 2),
    },
    "cuda": {
        "8x7b-1": Shape(1, 4096, 14336, 8, 2),
        "8x7b-8": Shape(8, 4096, 14336, 8, 2),
        "8x7b-4096": Shape(4096, 4096, 14336, 8, 2),
    },
}
QUICK = ("small-1", "small-512", "8x7b-1", "8x7b-4096")


def test_expert_mlp(bench, peers, device, shape, dtype, backend):
    tokens, hidden, ffn_dim, experts, top_k = shape
    kind = {"dtype": dtype, "device": device}
    values, expert_ids = torch.rand(tokens, experts, device=device).topk(top_k)  # random routing
    weights, expert_ids = values.softmax(-1), expert_ids.int()

    def inputs():
        w13 = torch.randn(experts, 2 * ffn_dim, hidden, **kind)
        w2 = torch.randn(experts, hidden, ffn_dim, **kind)
        return torch.randn(tokens, hidden, **kind), w13, w2, weights, expert_ids

    def run(*call):
        return ops.expert_mlp(*call, backend=backend)

    touched = len(expert_ids.unique())
    moved = (3 * touched * hidden * ffn_dim + 2 * tokens * hidden) * dtype.itemsize
    work = Work(bytes=moved, flops=6 * tokens * top_k * hidden * ffn_dim)
    bench(run, inputs, work, peers, cold=True)
