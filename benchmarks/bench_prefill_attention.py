"""prefill_attention without a cache: one long prompt, windowed and full, against torch's sdpa."""

import torch
from torch.nn import functional

from benchmarks.timing import DTYPES, Work, grid, measure
from mistral_kernels import ops

# (tokens, q_heads, kv_heads, head_dim, window)
SHAPES = {
    "cpu": {
        "small-2k-w512": (2048, 16, 4, 64, 512),
        "small-2k-full": (2048, 16, 4, 64, None),
    },
    "cuda": {
        "7b-16k-w4096": (16384, 32, 8, 128, 4096),
        "7b-16k-full": (16384, 32, 8, 128, None),
    },
}


@grid("prefill_attention", SHAPES)
def test_prefill_attention(benchmark, device, backend, shape):
    tokens, q_heads, kv_heads, head_dim, window = shape
    dtype = DTYPES[device]
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    rows = torch.arange(tokens, device=device)
    distance = rows[:, None] - rows
    mask = None if window is None else (distance >= 0) & (distance < window)

    def inputs():
        qkv = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
        return qkv.split((q_heads, kv_heads, kv_heads), 1)

    def run(q, k, v):
        if backend != "torch":
            return ops.prefill_attention(q, k, v, cu_seqlens, window=window, backend=backend)
        heads_first = (part.transpose(0, 1)[None] for part in (q, k, v))
        how = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": True}
        return functional.scaled_dot_product_attention(*heads_first, **how)

    width = min(window or tokens, tokens)
    seen = width * (width + 1) // 2 + (tokens - width) * width  # (query, key) pairs
    moved = 2 * tokens * (q_heads + kv_heads) * head_dim * dtype.itemsize
    measure(benchmark, run, inputs, Work(bytes=moved, flops=4 * seen * q_heads * head_dim))
