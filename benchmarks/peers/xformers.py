"""xformers' memory_efficient_attention with grouped heads; signatures of xformers 0.0.30.

Heads go in as (1, tokens, kv_heads, group, head_dim); keys and values are expanded over a group by
a stride of 0, which its kernels read without copies. Biases are made once.
"""

import torch
from torch import Tensor

from benchmarks.peers import packages

NAME = "xformers"
PLACES = (
    "xformers.ops:memory_efficient_attention",
    "xformers.ops.fmha.attn_bias:LowerTriangularFromBottomRightMask",
)


def missing(device: str) -> str | None:
    return packages.missing("xformers", *PLACES, needs_cuda=True, device=device)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """(batch, tokens, heads, head_dim) of each as (batch, tokens, kv_heads, group, head_dim)."""
    q = q.unflatten(2, (k.shape[2], -1))
    group = q.shape[3]
    return q, *(x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))


def prefill_attention(shape, dtype, device):
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    bias = LowerTriangularFromBottomRightMask()
    if shape.window is not None:
        bias = bias.make_local_attention(shape.window)  # the keys that a query sees, its own too

    def run(q, k, v):
        out = memory_efficient_attention(*grouped(q[None], k[None], v[None]), attn_bias=bias)
        return out[0].flatten(1, 2)

    return run


def decode_attention(shape, dtype, device):
    """Timed: both writes of the new key and value, and attention over the ring in slot order."""
    from xformers.ops import memory_efficient_attention

    rows = torch.arange(shape.batch, device=device)
    slots = torch.full_like(rows, shape.window - 1)

    def run(q, k, v, k_cache, v_cache, workspace):
        k_cache[rows, slots], v_cache[rows, slots] = k, v
        return memory_efficient_attention(*grouped(q[:, None], k_cache, v_cache)).flatten(1, 3)

    return run
