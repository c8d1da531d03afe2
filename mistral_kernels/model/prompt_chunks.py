"""How many tokens of prompts one step reads, so that what it works with stays within bounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.ops.checks import compute_dtype

WORKING_BYTES = 2 << 30
WHOLE_TILES = 256  # a chunk is a multiple of it, and no less
# More gains nothing. A GPU's GEMMs are full long before (not measured). On the CPU a prompt of 4096
# tokens took 0.91 to 1.00 of its time in one piece if read by 2048: one layer of hidden 512 and 8
# heads of 64, dense with full attention and 8 experts with window 512, float32 and bfloat16, one
# core, 2026-11-22.
MOST_TOKENS = {"cpu": 2048, "cuda": 8192}


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """About the bytes that a step which reads a prompt works with, for each of its tokens.

    At its peak a layer holds some four vectors as wide as the residual stream and three of all that
    is wider. A step on the CPU took 0.92 to 1.07 times that, two layers of hidden 1024 (dense) and
    512 (8 experts) in float32, 1024 and 4096 tokens, 2026-11-22; in bfloat16 less.
    """
    wide = (config.q_heads + 2 * config.kv_heads) * config.head_dim
    wide += max(config.top_k, 1) * config.ffn_dim
    return (4 * config.hidden + 3 * wide) * dtype.itemsize


def step_tokens(
    config: ModelConfig, dtype: torch.dtype, device_type: str, *, scored: bool = False
) -> int:
    """Tokens of prompts that one step reads unless the caller says how many.

    Args:
        config, dtype, device_type: of the model and where it is.
        scored: whether logits of all tokens are wanted, with their logarithms.

    >>> config = ModelConfig.known("mistral-7b-v0.3")
    >>> [step_tokens(config, torch.bfloat16, "cuda", scored=scored) for scored in (False, True)]
    [8192, 5120]
    """
    needed = token_bytes(config, dtype)
    if scored:
        needed += 2 * config.vocab * compute_dtype(dtype).itemsize
    tokens = WORKING_BYTES // needed // WHOLE_TILES * WHOLE_TILES
    return max(min(tokens, MOST_TOKENS.get(device_type, MOST_TOKENS["cuda"])), WHOLE_TILES)


def even_chunk(pending: Sequence[int], tokens: int) -> int:
    """The longest chunk for which a step takes at most `tokens` of sequences that want `pending`.

    Two sequences that decode leave the rest of 12 tokens to two prompts:

    >>> even_chunk([1, 30, 1, 40], 12), even_chunk([3, 30], 12), even_chunk([3, 4], 12)
    (5, 9, 4)
    """
    left = tokens
    for done, wanted in enumerate(sorted(pending)):
        share = left // (len(pending) - done)
        if wanted > share:
            return max(share, 1)
        left -= wanted
    return max(pending)
