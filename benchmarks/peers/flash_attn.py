"""flash-attention 2; signatures of flash_attn 2.8."""

import torch

from benchmarks.peers import packages

NAME = "flash_attn"
PLACES = (
    "flash_attn:flash_attn_varlen_func",
    "flash_attn:flash_attn_with_kvcache",
    "flash_attn.layers.rotary:apply_rotary_emb",
)


def missing(device: str) -> str | None:
    return packages.missing("flash_attn", *PLACES, needs_cuda=True, device=device)


def window_size(window: int | None) -> tuple[int, int]:
    """Keys before and behind a query that it sees beside its own; -1: all."""
    return (-1 if window is None else window - 1, 0)


def prefill_attention(shape, dtype, device):
    from flash_attn import flash_attn_varlen_func

    return attend_prompt(flash_attn_varlen_func, shape, dtype, device)


def decode_attention(shape, dtype, device):
    from flash_attn import flash_attn_with_kvcache

    return attend_cache(flash_attn_with_kvcache, shape, dtype, device)


def attend_prompt(attend, shape, dtype, device):
    """`attend` of version 2 or 3 on one prompt; its ends are made once."""
    if dtype == torch.float32:
        return "takes no float32"
    ends = torch.tensor([0, shape.tokens], dtype=torch.int32, device=device)
    call = (ends, ends, shape.tokens, shape.tokens)
    how = {"causal": True, "window_size": window_size(shape.window)}
    return lambda q, k, v: attend(q, k, v, *call, **how)


def attend_cache(attend, shape, dtype, device):
    """`attend` of version 2 or 3 on the full ring, a cache of `window` slots: in one call it writes
    the new key and value behind the others and attends to all.

    That is where the ring has them too, since the benchmark's new token comes to the last slot.
    """
    if dtype == torch.float32:
        return "takes no float32"
    cached = torch.full((shape.batch,), shape.window - 1, dtype=torch.int32, device=device)
    how = {"cache_seqlens": cached, "causal": True, "window_size": window_size(shape.window)}

    def run(q, k, v, k_cache, v_cache, workspace):
        return attend(q[:, None], k_cache, v_cache, k=k[:, None], v=v[:, None], **how)

    return run


def rope_(shape, dtype, device):
    from flash_attn.layers.rotary import apply_rotary_emb

    def run(q, k, cos, sin, positions, forms):
        # Its tables are of x's dtype; token i takes row i, as the benchmark's positions do.
        for x in (q, k):
            apply_rotary_emb(x[None], *forms["rounded"], interleaved=True, inplace=True)
        return k

    return run
