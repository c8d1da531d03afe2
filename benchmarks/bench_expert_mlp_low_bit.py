"""expert_mlp_low_bit: bound by reading the chosen experts' codes for few tokens."""

from typing import NamedTuple

import torch

from benchmarks.low_bit_weights import group_of, random_weight, weight_bytes
from benchmarks.timing import Work
from mistral_kernels import ops

OP = "expert_mlp_low_bit"


class Shape(NamedTuple):
    tokens: int
    hidden: int
    ffn_dim: int
    experts: int
    top_k: int
    format: str


def shapes(
    name: str, hidden: int, ffn_dim: int, experts: int, top_k: int, *tokens: int
) -> dict[str, Shape]:
    return {
        f"{name}-{kind}-{rows}": Shape(rows, hidden, ffn_dim, experts, top_k, kind)
        for kind in ("int4-g128", "int8", "fp8")
        for rows in tokens
    }


SHAPES = {
    "tiny": shapes("tiny", 128, 128, 4, 2, 1, 9),
    "cpu": shapes("small", 512, 1792, 8, 2, 1, 8, 512),
    "cuda": shapes("8x7b", 4096, 14336, 8, 2, 1, 8, 4096),
}


def test_expert_mlp_low_bit(bench, peers, device, shape, dtype, backend):
    tokens, hidden, ffn_dim, experts, top_k, name = shape
    how = group_of(name)
    values, expert_ids = torch.rand(tokens, experts, device=device).topk(top_k)  # random routing
    weights, expert_ids = values.softmax(-1), expert_ids.int()

    def inputs():
        up = random_weight((experts, 2 * ffn_dim, hidden), name, dtype, device)
        down = random_weight((experts, hidden, ffn_dim), name, dtype, device)
        dense = up.dequantise(dtype), down.dequantise(dtype)
        return torch.randn(tokens, hidden, dtype=dtype, device=device), up, down, dense

    def run(x, up, down, _):
        low = (up.qweight, up.scales, down.qweight, down.scales)
        return ops.expert_mlp_low_bit(x, *low, weights, expert_ids, **how, backend=backend)

    def dense_experts(x, up, down, dense):
        return ops.expert_mlp(x, *dense, weights, expert_ids)

    touched = len(expert_ids.unique())
    sizes = ((2 * ffn_dim, hidden), (hidden, ffn_dim))
    moved = touched * sum(weight_bytes(*size, name, dtype) for size in sizes)
    moved += 2 * tokens * hidden * dtype.itemsize
    work = Work(bytes=moved, flops=6 * tokens * top_k * hidden * ffn_dim)
    bench(run, inputs, work, peers | {"expert_mlp": dense_experts}, cold=True)
