"""What one step of a model must do at least: the bytes that it reads and the operations it counts.

Weights are read once a step, keys and values of the cache once a sequence; of an embedding only
rows are read. Of a layer's E experts a token meets k, drawn evenly: T tokens meet

    E (1 - (1 - k/E)^T)

different ones on average, which are the experts that the step reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.weight_table import parameter_shapes


class StepWork(NamedTuple):
    """Least work of a step."""

    bytes: int
    flops: int


def step_work(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    context: int,
    tokens: int = 1,
    batch: int = 1,
    low_bit: Mapping[str, LowBitForm] | None = None,
) -> StepWork:
    """The work of one step that ends in the logits of each sequence's last token.

    Args:
        config: the model.
        dtype: of its full weights, its keys and its values.
        context: tokens of each sequence in the cache before the step.
        tokens: fed to each sequence; 1 is decode.
        batch: sequences.
        low_bit: name to form of the weights in few bits, as `Transformer` takes it.

    Returns:
        Bytes read, and operations, two a multiplication with its sum; of attention only the pairs
        of query and key that its windows show.
    """
    low_bit = low_bit or {}
    read = operations = 0.0
    for name, shape in parameter_shapes(config).items():
        if name == "tok_embeddings" and not config.tied_embeddings:
            continue  # a row a token
        share = met = 1.0
        if len(shape) == 3:  # of experts
            share = config.top_k / config.experts
            met = 1 - (1 - share) ** (batch * tokens)
        elements = prod(shape)
        size = low_bit[name].nbytes(shape) if name in low_bit else elements * dtype.itemsize
        rows = batch * (1 if name in ("output", "tok_embeddings") else tokens)
        read += met * size
        operations += 2 * rows * share * elements
    for window, layers in Counter(config.windows).items():
        keys = context if window is None else min(window, context)
        read += layers * batch * 2 * keys * config.kv_heads * config.head_dim * dtype.itemsize
        pairs = visible_pairs(context, tokens, window)
        operations += layers * batch * 4 * pairs * config.q_heads * config.head_dim
    return StepWork(int(read), int(operations))


def visible_pairs(context: int, tokens: int, window: int | None) -> int:
    """Pairs of query and key, for `tokens` queries that follow `context` tokens.

    >>> [visible_pairs(4, 3, window) for window in (None, 6, 2)]  # 5 + 6 + 7, 5 + 6 + 6, 2 + 2 + 2
    [18, 17, 6]
    """
    seen = range(context + 1, context + tokens + 1)
    return sum(seen) if window is None else sum(min(window, keys) for keys in seen)
