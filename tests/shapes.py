"""Case tables that several test files share, and tensors in every layout that an op must take."""

from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "padded", "permuted")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values and shape with other strides; the last dimension stays contiguous.

    `padded` leaves a gap after each row; `permuted` is dense, but its first two leading dimensions
    lie in memory in the other order (a 2-D tensor has only one, and stays as it is).
    """
    if layout == "padded":
        return torch.nn.functional.pad(tensor, (0, 3))[..., : tensor.shape[-1]]
    if layout == "permuted" and tensor.dim() > 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.contiguous()


class Heads(NamedTuple):
    """Heads of one attention layer."""

    q_heads: int
    kv_heads: int
    head_dim: int


# Groups 1 to 8, multi-query, and every head_dim that is served.
HEADS = (
    Heads(2, 2, 16),
    Heads(4, 2, 32),
    Heads(3, 1, 64),
    Heads(8, 2, 16),
    Heads(5, 1, 80),
    Heads(6, 1, 16),
    Heads(7, 1, 16),
    Heads(8, 1, 16),
    Heads(4, 1, 128),
)


class Chunk(NamedTuple):
    """One call of attention on a rolling cache: ragged sequences, some of their tokens cached."""

    name: str
    context_lens: tuple[int, ...]
    seqlens: tuple[int, ...]
    window: int | None
    page_size: int
    pages_per_seq: int
    starts: tuple[int, ...] | None = None

    @property
    def capacity(self) -> int:
        return self.page_size * self.pages_per_seq


# The ring holds at least the window; what the cache lost is outside of it.
CHUNKS = (
    Chunk("first chunk, nothing cached", (0, 0), (5, 3), 4, 4, 2),
    Chunk("no window, cache never wraps", (9, 0, 3), (4, 7, 1), None, 4, 4),
    Chunk("no window, last slot filled", (12,), (4,), None, 8, 2),
    Chunk("window of one key", (6, 0), (3, 2), 1, 4, 1),
    Chunk("window below a page", (9, 30), (2, 5), 3, 8, 1),
    Chunk("window not a multiple of the page", (11, 25), (4, 9), 7, 4, 2),
    Chunk("window longer than everything", (5, 2), (3, 6), 64, 16, 1),
    Chunk("chunk shorter than the window, wraps inside", (6, 14), (3, 4), 8, 4, 2),
    Chunk("chunk as long as the window", (8, 13), (8, 8), 8, 4, 2),
    Chunk("chunk longer than the window", (5, 21), (19, 11), 8, 4, 2),
    Chunk("capacity above the window", (17, 40), (5, 3), 6, 4, 3),
    Chunk("sequences without new tokens", (7, 9, 0, 20), (0, 3, 0, 0), 8, 4, 2),
    Chunk("no tokens at all", (7, 0), (0, 0), 8, 4, 2),
    Chunk("left padding inside the window", (10, 12), (3, 2), 8, 4, 2, (5, 11)),
    Chunk("starts in the new tokens", (4, 6), (5, 2), None, 4, 3, (6, 7)),
    Chunk("starts left the window long ago", (30, 9), (2, 4), 8, 4, 2, (3, 0)),
    Chunk("one page of 16", (15, 16, 17), (1, 1, 5), 16, 16, 1),
)

# One new token a sequence: the first ever, around the edges of page and ring, and after wraps.
CONTEXTS = (0, 3, 6, 7, 8, 15, 16, 29)
ONES = (1,) * len(CONTEXTS)
STEPS = (
    Chunk("window is the ring", CONTEXTS, ONES, 8, 4, 2),
    Chunk("window below the ring", CONTEXTS, ONES, 6, 4, 3),
    Chunk("window of one key", CONTEXTS, ONES, 1, 4, 1),
    Chunk("window below a page", CONTEXTS, ONES, 3, 8, 1),
    Chunk("window not a multiple of the page", CONTEXTS, ONES, 7, 4, 2),
    Chunk("window longer than everything", CONTEXTS, ONES, 99, 16, 2),
    Chunk("no window", CONTEXTS, ONES, None, 16, 2),
    Chunk("no window, narrow ring", CONTEXTS, ONES, None, 4, 2),
    Chunk("left padding", CONTEXTS, ONES, 8, 4, 2, (0, 2, 6, 8, 1, 9, 10, 3)),
)
