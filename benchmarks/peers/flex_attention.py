"""torch's flex_attention, compiled, with a mask by blocks.

The mask is made once and compilation happens in the first call; neither is timed.
"""

import torch

from benchmarks.peers.sdpa import heads_first

NAME = "flex_attention"
SLOW_ON = ("cpu",)  # half a minute in a C++ compiler for each shape


def missing(device: str) -> str | None:
    return None


def prefill_attention(shape, dtype, device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, window = shape.tokens, shape.window

    def seen(batch, head, query, key):
        causal = query >= key
        return causal if window is None else causal & (query - key < window)

    mask = create_block_mask(seen, None, None, tokens, tokens, device=device)
    attend = torch.compile(flex_attention)

    def run(q, k, v):
        out = attend(*heads_first(q, k, v), block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return run
