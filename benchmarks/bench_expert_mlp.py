"""expert_mlp: bound by reading the chosen experts for few tokens, by the tensor cores for many."""

import torch
from torch.nn import functional

from benchmarks.timing import DTYPES, Work, grid, measure
from mistral_kernels import ops

# (tokens, hidden, ffn_dim, experts, top_k); routing is random
SHAPES = {
    "cpu": {"small-1": (1, 512, 1792, 8, 2), "small-256": (256, 512, 1792, 8, 2)},
    "cuda": {
        "8x7b-1": (1, 4096, 14336, 8, 2),
        "8x7b-8": (8, 4096, 14336, 8, 2),
        "8x7b-4096": (4096, 4096, 14336, 8, 2),
    },
}


def expert_loop(x, w13, w2, weights, expert_ids):
    """The eager loop over experts."""
    out = torch.zeros_like(x)
    for expert in range(len(w13)):
        tokens, slots = (expert_ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[tokens], w13[expert]).chunk(2, -1)
        down = functional.linear(functional.silu(gate) * up, w2[expert])
        out.index_add_(0, tokens, down * weights[tokens, slots, None].to(x.dtype))
    return out


@grid("expert_mlp", SHAPES)
def test_expert_mlp(benchmark, device, backend, shape):
    tokens, hidden, ffn_dim, experts, top_k = shape
    kind = {"dtype": DTYPES[device], "device": device}
    values, expert_ids = torch.rand(tokens, experts, device=device).topk(top_k)
    weights, expert_ids = values.softmax(-1), expert_ids.int()
    # The weights are read once a call and far larger than any cache: the input sets share them.
    w13 = torch.randn(experts, 2 * ffn_dim, hidden, **kind)
    w2 = torch.randn(experts, hidden, ffn_dim, **kind)

    def inputs():
        return torch.randn(tokens, hidden, **kind), w13, w2, weights, expert_ids

    def run(*call):
        return expert_loop(*call) if backend == "torch" else ops.expert_mlp(*call, backend=backend)

    touched = len(expert_ids.unique())
    moved = (3 * touched * hidden * ffn_dim + 2 * tokens * hidden) * kind["dtype"].itemsize
    measure(benchmark, run, inputs, Work(moved, 6 * tokens * top_k * hidden * ffn_dim))
