"""rope_ in place: bound by memory. Heads of Mistral 7B and of a small model, interleaved pairs."""

import torch

from benchmarks.timing import DTYPES, Work, grid, measure
from mistral_kernels import ops

# (tokens, q_heads, kv_heads, head_dim)
SHAPES = {
    "cpu": {"7b-1": (1, 32, 8, 128), "small-2048": (2048, 16, 4, 64)},
    "cuda": {"7b-1": (1, 32, 8, 128), "7b-32": (32, 32, 8, 128), "7b-16k": (16384, 32, 8, 128)},
}


def rotate_by_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The eager formula on pairs, written back in place as rope_ does."""
    pairs = x.unflatten(-1, (-1, 2)).float()
    a, b = pairs.unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    x.copy_(torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2))


@grid("rope_", SHAPES)
def test_rope(benchmark, device, backend, shape):
    tokens, q_heads, kv_heads, head_dim = shape
    dtype = DTYPES[device]

    def inputs():
        qkv = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
        angles = torch.rand(tokens, head_dim // 2, device=device)
        positions = torch.arange(tokens, dtype=torch.int32, device=device)
        q, k, _ = qkv.split((q_heads, kv_heads, kv_heads), 1)
        return q, k, angles.cos(), angles.sin(), positions

    def run(q, k, cos, sin, positions):
        if backend == "torch":
            rows = positions.long()
            rotate_by_torch(q, cos[rows], sin[rows])
            rotate_by_torch(k, cos[rows], sin[rows])
        else:
            ops.rope_(q, k, cos, sin, positions, interleaved=True, backend=backend)

    elements = tokens * (q_heads + kv_heads) * head_dim
    tables = tokens * head_dim * 4  # cos and sin, float32
    work = Work(bytes=2 * elements * dtype.itemsize + tables, flops=3 * elements)
    measure(benchmark, run, inputs, work)
