"""prefill_attention without a cache: one prompt, windowed at growing lengths, and full."""

from typing import NamedTuple

import torch

from benchmarks.timing import Work
from mistral_kernels import ops
from mistral_kernels.peak_memory import peak_bytes

OP = "prefill_attention"


class Shape(NamedTuple):
    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None


SHAPES = {
    "tiny": {"tiny-w24": Shape(300, 4, 2, 16, 24), "tiny-full": Shape(40, 4, 2, 16, None)},
    "cpu": {
        "small-2k-w512": Shape(2048, 16, 4, 64, 512),
        "small-4k-w512": Shape(4096, 16, 4, 64, 512),
        "small-8k-w512": Shape(8192, 16, 4, 64, 512),
        "small-16k-w512": Shape(16384, 16, 4, 64, 512),
        "small-2k-full": Shape(2048, 16, 4, 64, None),
    },
    "cuda": {
        "7b-16k-w4096": Shape(16384, 32, 8, 128, 4096),
        "7b-16k-full": Shape(16384, 32, 8, 128, None),
    },
}
QUICK = ("small-2k-w512", "small-4k-w512", "7b-16k-w4096")


def test_prefill_attention(bench, peers, device, shape, dtype, backend):
    tokens, q_heads, kv_heads, head_dim, window = shape
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)

    def inputs():
        qkv = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
        return qkv.split((q_heads, kv_heads, kv_heads), 1)

    def run(q, k, v):
        return ops.prefill_attention(q, k, v, cu_seqlens, window=window, backend=backend)[0]

    width = min(window or tokens, tokens)
    seen = width * (width + 1) // 2 + (tokens - width) * width  # (query, key) pairs
    moved = 2 * tokens * (q_heads + kv_heads) * head_dim * dtype.itemsize
    work = Work(bytes=moved, flops=4 * seen * q_heads * head_dim)
    row = bench(run, inputs, work, peers)
    if device == "cpu":
        qkv = inputs()
        row["peak_bytes"] = peak_bytes(lambda: run(*qkv))
