"""rope_ in place: bound by memory. Heads of Mistral 7B and of a small model, interleaved pairs."""

from typing import NamedTuple

import torch

from benchmarks.timing import Work
from mistral_kernels import ops

OP = "rope_"


class Shape(NamedTuple):
    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "tiny": {"tiny-3": Shape(3, 4, 2, 16)},
    "cpu": {"7b-1": Shape(1, 32, 8, 128), "small-2048": Shape(2048, 16, 4, 64)},
    "cuda": {
        "7b-1": Shape(1, 32, 8, 128),
        "7b-32": Shape(32, 32, 8, 128),
        "7b-16k": Shape(16384, 32, 8, 128),
    },
}


def test_rope(bench, peers, device, shape, dtype, backend):
    tokens, q_heads, kv_heads, head_dim = shape

    def inputs():
        qkv = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
        angles = torch.rand(tokens, head_dim // 2, device=device)
        positions = torch.arange(tokens, dtype=torch.int32, device=device)
        q, k, _ = qkv.split((q_heads, kv_heads, kv_heads), 1)
        cos, sin = angles.cos(), angles.sin()
        # The same tables as some peers keep them.
        forms = {"joined": torch.cat((cos, sin), 1), "rounded": (cos.to(dtype), sin.to(dtype))}
        return q, k, cos, sin, positions, forms

    def run(q, k, cos, sin, positions, _):
        ops.rope_(q, k, cos, sin, positions, interleaved=True, backend=backend)
        return k

    elements = tokens * (q_heads + kv_heads) * head_dim
    tables = tokens * head_dim * 4  # cos and sin, float32
    moved = 2 * elements * dtype.itemsize + tables
    work = Work(bytes=moved, flops=3 * elements, writes=True)
    bench(run, inputs, work, peers)
