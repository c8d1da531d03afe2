"""store_kv_: bound by memory. One token a sequence and a prefill chunk, into rings of a window."""

from typing import NamedTuple

import torch

from benchmarks.timing import Work
from mistral_kernels import ops

OP = "store_kv_"
PAGE_SIZE = 16


class Shape(NamedTuple):
    batch: int
    chunk: int  # tokens a sequence
    kv_heads: int
    head_dim: int
    window: int


SHAPES = {
    "tiny": {"tiny-2": Shape(2, 5, 2, 8, 32)},
    "cpu": {
        "small-decode-8": Shape(8, 1, 4, 64, 512),
        "small-chunk-512": Shape(1, 512, 4, 64, 512),
    },
    "cuda": {
        "7b-decode-32": Shape(32, 1, 8, 128, 4096),
        "7b-chunk-4096": Shape(1, 4096, 8, 128, 4096),
    },
}


def test_store_kv(bench, peers, device, shape, dtype, backend):
    batch, chunk, kv_heads, head_dim, window = shape
    pages = window // PAGE_SIZE

    def inputs():
        kv = torch.randn(2, batch * chunk, kv_heads, head_dim, dtype=dtype, device=device)
        caches = torch.zeros(
            2, batch * pages, PAGE_SIZE, kv_heads, head_dim, dtype=dtype, device=device
        )
        table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
        cu_seqlens = torch.arange(0, batch + 1, device=device, dtype=torch.int32) * chunk
        context_lens = torch.full((batch,), 3 * window + 5, dtype=torch.int32, device=device)
        return *kv, *caches, table, cu_seqlens, context_lens

    def run(k, v, k_cache, v_cache, table, cu_seqlens, context_lens):
        where = (table, cu_seqlens, context_lens)
        ops.store_kv_(k, v, k_cache, v_cache, *where, backend=backend)
        return v_cache

    moved = 4 * batch * chunk * kv_heads * head_dim * dtype.itemsize  # k and v, read and written
    bench(run, inputs, Work(bytes=moved, flops=0, writes=True), peers)
