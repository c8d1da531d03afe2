"""route_experts: Mixtral's top-2 of 8, one token to a long prompt; launches decide, not bytes."""

import torch

from benchmarks.timing import DTYPES, Work, grid, measure
from mistral_kernels import ops

# (tokens, experts, top_k)
SHAPES = {
    "cpu": {"8x7b-1": (1, 8, 2), "8x7b-2048": (2048, 8, 2)},
    "cuda": {"8x7b-1": (1, 8, 2), "8x7b-32": (32, 8, 2), "8x7b-4096": (4096, 8, 2)},
}


@grid("route_experts", SHAPES)
def test_route_experts(benchmark, device, backend, shape):
    tokens, experts, top_k = shape
    dtype = DTYPES[device]

    def inputs():
        return (torch.randn(tokens, experts, dtype=dtype, device=device),)

    def run(logits):
        if backend == "torch":
            values, expert_ids = logits.topk(top_k)
            return values.float().softmax(-1), expert_ids
        return ops.route_experts(logits, top_k, backend=backend)

    # Logits in; a float32 weight and an int32 id out for each slot.
    moved = tokens * (experts * dtype.itemsize + top_k * 8)
    measure(benchmark, run, inputs, Work(bytes=moved, flops=tokens * (experts + 3) * top_k))
