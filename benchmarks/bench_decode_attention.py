"""decode_attention: bound by reading the window's keys and values. Full rings, one page each.

The new token comes to the last slot, so that a peer whose cache only grows can work on the same
memory; a peer that knows no ring attends to it in slot order, which for one query gives the same
result. Nobody rotates.
"""

from typing import NamedTuple

import torch

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


def test_decode_attention(bench, peers, device, shape, dtype, backend):
    batch, q_heads, kv_heads, head_dim, window = shape
    table = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    positions = torch.full((batch,), 4 * window - 1, dtype=torch.int32, device=device)

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

    seen = batch * window * head_dim
    work = Work(bytes=2 * seen * kv_heads * dtype.itemsize, flops=4 * seen * q_heads)
    bench(run, inputs, work, peers, cold=True)
