"""prefill_attention without a cache: one prompt, windowed at growing lengths, and full.

Peers by torch's sdpa: with the whole mask; and over blocks of queries with just the keys that they
may see, the fastest way found without a kernel of one's own (additive mask, `enable_gqa`; expanded
heads are as fast, all blocks as one batch needs padded copies and is no faster).
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks.memory import peak_bytes
from benchmarks.timing import Work
from mistral_kernels import ops

OP = "prefill_attention"
BLOCK = 256
MASK_TOKENS = 8192  # longest prompt with the whole mask; at 16k it takes 10 s a call


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


def sdpa(q, k, v, mask=None, **how):
    """torch's attention on (tokens, heads, head_dim)."""
    heads_first = (part.transpose(0, 1)[None] for part in (q, k, v))
    out = functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, enable_gqa=True, **how
    )
    return out[0].transpose(0, 1)


def window_mask(queries: int, keys: int, window: int, device: str) -> torch.Tensor:
    """(queries, keys): which keys the last `queries` of as many positions as keys may see."""
    rows = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = rows - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


def sdpa_in_blocks(q, k, v, window: int, additive: torch.Tensor) -> torch.Tensor:
    """Each BLOCK of queries with its up to BLOCK + window - 1 keys."""
    out = torch.empty_like(q)
    for begin in range(0, len(q), BLOCK):
        end, first = min(begin + BLOCK, len(q)), max(0, begin - window + 1)
        # Columns of the mask stand for the keys from begin - window + 1.
        columns = slice(first - begin + window - 1, end - begin + window - 1)
        mask = additive[: end - begin, columns]
        out[begin:end] = sdpa(q[begin:end], k[first:end], v[first:end], mask)
    return out


def peers_of(shape: Shape, dtype: torch.dtype, device: str) -> dict:
    tokens, window = shape.tokens, shape.window
    if window is None:
        return {"sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True)}
    seen = window_mask(BLOCK, BLOCK + window - 1, window, device)
    additive = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    peers = {"sdpa in blocks": lambda q, k, v: sdpa_in_blocks(q, k, v, window, additive)}
    if tokens <= MASK_TOKENS:
        mask = window_mask(tokens, tokens, window, device)
        peers["masked sdpa"] = lambda q, k, v: sdpa(q, k, v, mask)
    return peers


def test_prefill_attention(bench, device, shape, dtype, backend):
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
    row = bench(run, inputs, work, peers_of(shape, dtype, device))
    if device == "cpu":
        qkv = inputs()
        row["peak_bytes"] = peak_bytes(lambda: run(*qkv))
