"""Rolling paged caches for tests, written slot by slot in plain Python, NaN in every other slot.

Keys and values of a sequence are made as one long history, so that what an op should see is a slice
of it; the ring below is only where the op finds them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from oracle import f64, quantise
from torch import Tensor

PAGE_LAYOUTS = ("head-major", "token-major")


def in_turns(chunks: Sequence) -> list:
    """Return test parameters (chunk, page layout), layouts taking turns: each is only strides."""
    pairs = zip(chunks, itertools.cycle(PAGE_LAYOUTS), strict=False)
    return [pytest.param(chunk, layout, id=f"{chunk.name}-{layout}") for chunk, layout in pairs]


@dataclass
class Ring:
    """One layer's cache: logically (pages, page_size, kv_heads, head_dim), with its page table."""

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.block_table.shape[1] * self.k_cache.shape[1]

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        """Return the (page, row) where a position lives, giving the slot's page if it has none."""
        column, row = divmod(position % self.capacity, self.k_cache.shape[1])
        if self.block_table[sequence, column] < 0:
            used = set(self.block_table.flatten().tolist())
            free = [page for page in range(len(self.k_cache)) if page not in used]
            # Not in order: the third free page, or the last one.
            self.block_table[sequence, column] = free[min(2, len(free) - 1)]
        return int(self.block_table[sequence, column]), row

    def write(self, sequence: int, position: int, k: Tensor, v: Tensor) -> None:
        """Store one token's (kv_heads, head_dim) key and value."""
        page, row = self.place(sequence, position)
        put(self.k_cache, page, row, k, self.k_scale)
        put(self.v_cache, page, row, v, self.v_scale)

    def fill(self, sequence: int, k: Tensor, v: Tensor, first: int, stop: int) -> None:
        """Store positions first..stop-1 of a history (tokens, kv_heads, head_dim), oldest first."""
        for position in range(first, stop):
            self.write(sequence, position, k[position], v[position])

    def arguments(self) -> dict[str, Tensor]:
        """Return the cache arguments that the ops share, without scales where there are none."""
        named = {"k_cache": self.k_cache, "v_cache": self.v_cache, "block_table": self.block_table}
        if self.k_scale is not None:
            named |= {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return named

    def copy(self) -> "Ring":
        """Return a ring whose caches and table are its own, in the same memory order."""
        tensors = (t if t is None else t.clone() for t in vars(self).values())
        return Ring(*tensors)


def put(cache: Tensor, page: int, row: int, x: Tensor, scale: Tensor | None) -> None:
    """Write one (kv_heads, head_dim) row, rounded by the oracle if the cache is quantised."""
    if scale is not None:
        x = torch.from_numpy(quantise(f64(x)[None], f64(scale), cache.dtype)[0])
    cache[page, row] = x.to(cache.device, cache.dtype)


def stored(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what keys or values (tokens, kv_heads, head_dim) read back as: x itself or float64."""
    if scale is None:
        return x
    steps = torch.from_numpy(quantise(f64(x), f64(scale), dtype)).to(x.device)
    return steps * scale.double().view(1, -1, 1)


def empty_ring(
    batch: int,
    pages_per_seq: int,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "head-major",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Ring:
    """Return a ring with no pages given out and two pages to spare; slots hold NaN (int8: 111)."""
    poison = 111 if dtype == torch.int8 else torch.nan

    def cache() -> Tensor:
        pages = torch.full(
            (batch * pages_per_seq + 2, kv_heads, page_size, head_dim), poison, device=device
        ).to(dtype)
        if layout == "head-major":
            return pages.transpose(1, 2)
        return pages.view(-1, page_size, kv_heads, head_dim)

    table = torch.full((batch, pages_per_seq), -1, dtype=torch.int32, device=device)
    return Ring(cache(), cache(), table, k_scale, v_scale)


def one_token_ring(heads: int, head_dim: int, dtype: torch.dtype, device: str) -> Ring:
    """Return a quantised ring of scale 1 whose only slot has its page."""
    one = torch.ones(1, device=device)
    kind = {"dtype": dtype, "device": device, "k_scale": one, "v_scale": one}
    cache = empty_ring(1, 1, 1, heads, head_dim, **kind)
    cache.place(0, 0)
    return cache


def codes(dtype: torch.dtype) -> Tensor:
    """Return every number of an 8-bit format, NaN included."""
    return torch.arange(256, dtype=torch.uint8).view(dtype)
