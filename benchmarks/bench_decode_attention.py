"""decode_attention: bound by reading the window's keys and values. Full rings, one page each.

The peer writes the new key and attends the ring in slot order by torch's sdpa, which for one query
gives the same result. Neither rotates.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks.timing import Work
from mistral_kernels import ops
from mistral_kernels.ops.decode_attention import decode_attention_workspace_bytes

OP = "decode_attention"


class Shape(NamedTuple):
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int


SHAPES = {
    "tiny": {"tiny-2": Shape(2, 4, 2, 16, 32)},
    "cpu": {
        "small-1-w512": Shape(1, 16, 4, 64, 512),
        "small-8-w512": Shape(8, 16, 4, 64, 512),
        "7b-1-w4096": Shape(1, 32, 8, 128, 4096),
    },
    "cuda": {
        "7b-1-w4096": Shape(1, 32, 8, 128, 4096),
        "7b-8-w4096": Shape(8, 32, 8, 128, 4096),
        "7b-32-w4096": Shape(32, 32, 8, 128, 4096),
    },
}
QUICK = ("small-8-w512", "7b-1-w4096", "7b-32-w4096")


def test_decode_attention(bench, device, shape, dtype, backend):
    batch, q_heads, kv_heads, head_dim, window = shape
    rows = torch.arange(batch, device=device)
    table = rows.int()[:, None]
    positions = (3 * window + 7 + rows).int()
    slots = (positions % window).long()

    def inputs():
        qkv = torch.randn(batch, q_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
        # Head-major within a page, as the model's allocator lays a cache out.
        kv = torch.randn(2, batch, kv_heads, window, head_dim, dtype=dtype, device=device)
        k_cache, v_cache = kv.transpose(2, 3)
        how = {"q_heads": q_heads, "window": window, "dtype": dtype, "backend": backend}
        size = decode_attention_workspace_bytes(k_cache, table, **how)
        workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        return *qkv.split((q_heads, kv_heads, kv_heads), 1), k_cache, v_cache, workspace

    def run(q, k, v, k_cache, v_cache, workspace):
        where, how = (k_cache, v_cache, table, positions), {"window": window, "backend": backend}
        return ops.decode_attention(q, k, v, *where, workspace=workspace, **how)[0]

    def by_sdpa(q, k, v, k_cache, v_cache, workspace):
        k_cache[rows, slots], v_cache[rows, slots] = k, v
        parts = q[:, :, None], k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        return functional.scaled_dot_product_attention(*parts, enable_gqa=True)

    seen = batch * window * head_dim
    work = Work(bytes=2 * seen * kv_heads * dtype.itemsize, flops=4 * seen * q_heads)
    bench(run, inputs, work, {"sdpa": by_sdpa}, cold=True)
