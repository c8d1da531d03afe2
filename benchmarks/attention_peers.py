"""Attention over one prompt as torch has it: (tokens, heads, head_dim) in and out.

By sdpa: with the whole mask; and over blocks of queries with just the keys that they may see, the
fastest way found on the CPU without a kernel of one's own (additive mask, `enable_gqa`; expanded
heads are as fast, all blocks as one batch needs padded copies and is no faster). On a GPU also by
flex_attention, compiled, and by varlen_attn, where torch's has a window.
"""

import inspect
from collections.abc import Callable

import torch
from torch.nn import functional

BLOCK = 256
MASK_TOKENS = 8192  # longest prompt with the whole mask; at 16k it takes 10 s a call on a CPU


def heads_first(*parts: torch.Tensor) -> list[torch.Tensor]:
    """(1, heads, tokens, head_dim), as torch wants them."""
    return [part.transpose(0, 1)[None] for part in parts]


def sdpa(q, k, v, mask=None, **how):
    """torch's attention on (tokens, heads, head_dim)."""
    out = functional.scaled_dot_product_attention(
        *heads_first(q, k, v), attn_mask=mask, enable_gqa=True, **how
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


def flex_attention(tokens: int, window: int | None, device: str) -> Callable:
    """torch's flex_attention with a mask by blocks; on a GPU it has to be compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch, head, query, key):
        causal = query >= key
        return causal if window is None else causal & (query - key < window)

    mask = create_block_mask(seen, None, None, tokens, tokens, device=device)
    attend = torch.compile(flex_attention) if device == "cuda" else flex_attention

    def run(q, k, v):
        out = attend(*heads_first(q, k, v), block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return run


def varlen_attention(tokens: int, window: int | None, device: str) -> Callable | None:
    """torch's varlen_attn, a flash attention; None where it takes no window yet."""
    from torch.nn.attention.varlen import varlen_attn

    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    sides = (-1 if window is None else window - 1, 0)  # keys before and behind a query
    call = (ends, ends, tokens, tokens)
    return lambda q, k, v: varlen_attn(q, k, v, *call, window_size=sides, enable_gqa=True)


def attention_peers(
    tokens: int, window: int | None, dtype: torch.dtype, device: str
) -> dict[str, Callable]:
    """Name -> causal attention of q, k and v over the last `window` keys, None for all."""
    if window is None:
        peers = {"sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True)}
    else:
        seen = window_mask(BLOCK, BLOCK + window - 1, window, device)
        additive = torch.zeros(seen.shape, dtype=dtype, device=device)
        additive.masked_fill_(~seen, -torch.inf)
        peers = {"sdpa in blocks": lambda q, k, v: sdpa_in_blocks(q, k, v, window, additive)}
        if tokens <= MASK_TOKENS:
            mask = window_mask(tokens, tokens, window, device)
            peers["masked sdpa"] = lambda q, k, v: sdpa(q, k, v, mask)
    if device == "cuda":
        peers["flex_attention"] = flex_attention(tokens, window, device)
        if varlen := varlen_attention(tokens, window, device):
            peers["varlen_attn"] = varlen
    return peers
