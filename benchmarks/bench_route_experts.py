"""route_experts: Mixtral's top-2 of 8, one token to a long prompt; launches decide, not bytes."""

from typing import NamedTuple

import torch

from benchmarks.timing import Work
from mistral_kernels import ops

OP = "route_experts"


class Shape(NamedTuple):
    tokens: int
    experts: int
    top_k: int


SHAPES = {
    "tiny": {"tiny-3": Shape(3, 5, 2)},
    "cpu": {"8x7b-1": Shape(1, 8, 2), "8x7b-2048": Shape(2048, 8, 2)},
    "cuda": {"8x7b-1": Shape(1, 8, 2), "8x7b-32": Shape(32, 8, 2), "8x7b-4096": Shape(4096, 8, 2)},
}


def test_route_experts(bench, peers, device, shape, dtype, backend):
    tokens, experts, top_k = shape

    def inputs():
        return (torch.randn(tokens, experts, dtype=dtype, device=device),)

    def run(logits):
        return ops.route_experts(logits, top_k, backend=backend)[0]

    # Logits in; a float32 weight and an int32 id out for each slot.
    moved = tokens * (experts * dtype.itemsize + top_k * 8)
    work = Work(bytes=moved, flops=tokens * (experts + 3) * top_k, writes=True)
    bench(run, inputs, work, peers)
