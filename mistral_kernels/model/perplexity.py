"""How well a model predicts a text: nats a token, by sliding windows over the rolling cache.

A text is fed once, in pieces, so each token is predicted from all that the windows of the layers
let it see. A layer without a window would have to keep a whole long text; then the text is cut into
stretches of `context` tokens that begin half a stretch apart, and of each only what no earlier one
predicted counts. Ten tokens in stretches of four, the predicted ones marked:

>>> for stretch in stretches(list(range(10)), 4):
...     print(stretch.tokens, "from", stretch.first)
[0, 1, 2, 3] from 1
[2, 3, 4, 5] from 2
[4, 5, 6, 7] from 2
[6, 7, 8, 9] from 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.transformer import Transformer

# Logits of so many tokens are held at once: 2048 of a vocabulary of 8192, 64 MB of float32.
CHUNK_LOGITS = 1 << 24
CHUNK_TOKENS = range(128, 2049)  # but no fewer, for speed, and no more


class Stretch(NamedTuple):
    """Tokens that are fed one after another."""

    tokens: list[int]
    first: int  # index of the first one whose prediction counts; 0 is predicted from nothing


class Predicted(NamedTuple):
    """What `perplexity` returns."""

    nats: float  # of all predicted tokens together
    tokens: int  # predicted ones

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def stretches(tokens: list[int], context: int | None) -> Iterator[Stretch]:
    """The text itself, or where it has more than `context` tokens, stretches of it."""
    if context is None or len(tokens) <= context:
        yield Stretch(tokens, 1)
        return
    half = max(1, context // 2)
    done = 1  # tokens that need no more predictions
    for begin in range(0, len(tokens) - context + half, half):
        stretch = tokens[begin : begin + context]
        yield Stretch(stretch, done - begin)
        done = begin + len(stretch)


def perplexity(
    model: Transformer,
    texts: Sequence[list[int]],
    *,
    context: int | None = None,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Predicted:
    """Predicts every token of some texts but their first ones.

    Args:
        model: any.
        texts: token ids; texts know nothing of each other.
        context: most tokens fed one after another, at least 2; None: each whole text, for which
            layers without a window keep keys and values.
        advance: called now and then with the number of tokens predicted since.

    Returns:
        The negative logarithms of the probabilities, summed in float64, and how many they are.

    Raises:
        ValueError: no text has two tokens, or the context is too small.
        RuntimeError: logits are not finite.
    """
    if context is not None and context < 2:
        raise ValueError(f"perplexity: context must be >= 2, got {context}")
    if not any(len(text) > 1 for text in texts):
        raise ValueError("perplexity: nothing to predict in texts of fewer than two tokens")
    chunk = min(max(CHUNK_LOGITS // model.config.vocab, CHUNK_TOKENS[0]), CHUNK_TOKENS[-1])
    nats, count = 0.0, 0
    told = (text for text in texts if len(text) > 1)
    cut = (stretch for text in told for stretch in stretches(text, context))
    for batch in _batches(cut, chunk):
        cache = model.new_cache(len(batch), max(len(stretch.tokens) for stretch in batch))
        while any(todo := [len(s.tokens) - n for s, n in zip(batch, cache.lengths, strict=True)]):
            # A batch is fed at once, or it is a single stretch that goes in pieces.
            seqlens, lengths = [min(n, chunk) for n in todo], list(cache.lengths)
            parts = zip(batch, lengths, seqlens, strict=True)
            ids = [token for s, begin, n in parts for token in s.tokens[begin : begin + n]]
            logits = model.forward(torch.tensor(ids), seqlens, cache)
            rows = logits.split(seqlens)
            for stretch, begin, part in zip(batch, lengths, rows, strict=True):
                losses = _losses(part, stretch, begin)
                nats += losses.double().sum().item()
                count += len(losses)
                advance(len(losses))
            if not math.isfinite(nats):
                raise RuntimeError("perplexity: logits are not finite")
    return Predicted(nats, count)


def _losses(logits: Tensor, stretch: Stretch, begin: int) -> Tensor:
    """Negative log-probabilities of what follows the tokens from `begin` on, where it counts."""
    targets = stretch.tokens[begin + 1 : begin + 1 + len(logits)]
    skipped = min(max(stretch.first - begin - 1, 0), len(targets))
    kept = torch.tensor(targets[skipped:], dtype=torch.int64, device=logits.device)
    return torch.nn.functional.cross_entropy(logits[skipped : len(targets)], kept, reduction="none")


def _batches(found: Iterator[Stretch], chunk: int) -> Iterator[list[Stretch]]:
    """Neighbours that fit into one chunk together; a longer stretch alone."""
    batch: list[Stretch] = []
    for stretch in found:
        if batch and sum(len(s.tokens) for s in batch) + len(stretch.tokens) > chunk:
            yield batch
            batch = []
        batch.append(stretch)
    yield batch
