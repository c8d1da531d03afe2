"""torch's scaled_dot_product_attention.

Over one prompt with the whole mask; and over blocks of queries with just the keys that they may
see, the fastest way found on the CPU without a kernel of one's own (additive mask, `enable_gqa`;
expanded heads are as fast, all blocks as one batch needs padded copies and is no faster). Masks are
made once and are not timed.
"""

import torch
from torch import Tensor
from torch.nn import functional

NAME = "sdpa"
BLOCK = 256
MASK_TOKENS = 8192  # longest prompt with the whole mask; at 16k it takes 10 s a call on a CPU


def missing(device: str) -> str | None:
    return None


def heads_first(*parts: Tensor) -> list[Tensor]:
    """(tokens, heads, head_dim) as (1, heads, tokens, head_dim), which torch wants."""
    return [part.transpose(0, 1)[None] for part in parts]


def attend(q, k, v, mask=None, **how) -> Tensor:
    """torch's attention on (tokens, heads, head_dim)."""
    out = functional.scaled_dot_product_attention(
        *heads_first(q, k, v), attn_mask=mask, enable_gqa=True, **how
    )
    return out[0].transpose(0, 1)


def window_mask(queries: int, keys: int, window: int, device: str) -> Tensor:
    """(queries, keys): which keys the last `queries` of as many positions as keys may see."""
    rows = torch.arange(keys - queries, keys, device=device)[:, None]
    distance = rows - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


def attend_in_blocks(q, k, v, window: int, additive: Tensor) -> Tensor:
    """Each BLOCK of queries with its up to BLOCK + window - 1 keys."""
    out = torch.empty_like(q)
    for begin in range(0, len(q), BLOCK):
        end, first = min(begin + BLOCK, len(q)), max(0, begin - window + 1)
        # Columns of the mask stand for the keys from begin - window + 1.
        columns = slice(first - begin + window - 1, end - begin + window - 1)
        mask = additive[: end - begin, columns]
        out[begin:end] = attend(q[begin:end], k[first:end], v[first:end], mask)
    return out


def prefill_attention(shape, dtype, device):
    tokens, window = shape.tokens, shape.window
    if window is None:
        return {"sdpa": lambda q, k, v: attend(q, k, v, is_causal=True)}
    seen = window_mask(BLOCK, BLOCK + window - 1, window, device)
    additive = torch.zeros(seen.shape, dtype=dtype, device=device)
    additive.masked_fill_(~seen, -torch.inf)
    calls = {"sdpa in blocks": lambda q, k, v: attend_in_blocks(q, k, v, window, additive)}
    if tokens <= MASK_TOKENS:
        mask = window_mask(tokens, tokens, window, device)
        calls["masked sdpa"] = lambda q, k, v: attend(q, k, v, mask)
    return calls


def decode_attention(shape, dtype, device):
    """Timed: both writes of the new key and value, and attention over the ring in slot order, which
    for one query gives the same result."""
    rows = torch.arange(shape.batch, device=device)
    slots = torch.full_like(rows, shape.window - 1)

    def run(q, k, v, k_cache, v_cache, workspace):
        k_cache[rows, slots], v_cache[rows, slots] = k, v
        parts = q[:, :, None], k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        return functional.scaled_dot_product_attention(*parts, enable_gqa=True)

    return run
