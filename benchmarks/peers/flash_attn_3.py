"""flash-attention 3, for Hopper; signatures of 3.0 beta, its folder `hopper`.

They differ from version 2's in what this benchmark does not use.
"""

from benchmarks.peers import packages
from benchmarks.peers.flash_attn import attend_cache, attend_prompt

NAME = "flash_attn_3"
MODULE = "flash_attn_interface"
PLACES = (f"{MODULE}:flash_attn_varlen_func", f"{MODULE}:flash_attn_with_kvcache")


def missing(device: str) -> str | None:
    return packages.missing(MODULE, *PLACES, needs_cuda=True, device=device)


def prefill_attention(shape, dtype, device):
    from flash_attn_interface import flash_attn_varlen_func

    return attend_prompt(flash_attn_varlen_func, shape, dtype, device)


def decode_attention(shape, dtype, device):
    from flash_attn_interface import flash_attn_with_kvcache

    return attend_cache(flash_attn_with_kvcache, shape, dtype, device)
