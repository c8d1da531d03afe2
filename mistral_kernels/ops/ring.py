"""The rolling paged cache, as the reference sees it: where a position lives, and what a slot holds.

Position p of a sequence lives in logical slot p % capacity, that is page
block_table[slot // page_size], row slot % page_size. Five positions in a ring of four slots:

>>> ring_slots(torch.arange(5), capacity=4).tolist()
[0, 1, 2, 3, 0]

Position 4 overwrote position 0: once `last` is written, slot s holds last - (last - s) % capacity.

>>> [4 - (4 - slot) % 4 for slot in range(4)]
[4, 1, 2, 3]
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.checks import QUANTISED, Arguments, compute_dtype
from mistral_kernels.ops.dispatch import KERNEL_DTYPES, address

CACHE_DTYPES = (*KERNEL_DTYPES, *QUANTISED)  # csrc/dtype.h numbers them in this order


def has_overwritten(written: int, capacity: int, window: int | None, length: int) -> bool:
    """Whether a ring that has held `written` tokens of a sequence lacks keys which the token at
    position `length` must see."""
    # Of earlier keys it sees oldest .. length - 1.
    oldest = 0 if window is None else max(0, length - window + 1)
    return min(written - capacity, length) > oldest


def ring_slots(positions: Tensor, capacity: int) -> Tensor:
    """The logical slot of each position."""
    return positions % capacity


def packed_rows(cu_seqlens: Tensor, context_lens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequence and position of each packed row: `(tokens,)` int64 each.

    Two sequences of 2 and 1 rows, the first with 5 tokens in the cache already:

    >>> sequences, positions = packed_rows(torch.tensor([0, 2, 3]), torch.tensor([5, 0]), 3)
    >>> sequences.tolist(), positions.tolist()
    ([0, 0, 1], [5, 6, 0])
    """
    rows = torch.arange(tokens, device=cu_seqlens.device)
    sequences = torch.bucketize(rows, cu_seqlens[1:].long(), right=True)
    return sequences, context_lens[sequences].long() + rows - cu_seqlens[sequences].long()


def _bytes_view(cache: Tensor) -> Tensor:
    # Indexing is not implemented for float8 everywhere; its bytes can be moved instead.
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _rounded(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (rows, kv_heads, head_dim) as the cache stores it."""
    if dtype not in QUANTISED:
        return x.to(dtype)
    value = x.to(compute_dtype(x.dtype)) / scale.view(1, -1, 1)
    if dtype == torch.int8:
        return value.round().clamp(-128, 127).to(dtype)
    return value.clamp(-448, 448).to(dtype)


def write_ring(
    x: Tensor,
    cache: Tensor,
    block_table: Tensor,
    sequences: Tensor,
    positions: Tensor,
    scale: Tensor | None,
) -> None:
    """Stores x (rows, kv_heads, head_dim) at (sequence, position); no two rows share a slot."""
    page_size = cache.shape[1]
    slots = ring_slots(positions, block_table.shape[1] * page_size)
    pages = block_table[sequences, slots // page_size].long()
    _bytes_view(cache)[pages, slots % page_size] = _bytes_view(_rounded(x, scale, cache.dtype))


def read_ring(
    cache: Tensor,
    pages: Tensor,
    first: int,
    last: int,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of positions first..last (both included) in position order, as `dtype`.

    `pages` is the sequence's row of the block table; only the pages of these positions are read.
    """
    page_size = cache.shape[1]
    positions = torch.arange(first, last + 1, device=cache.device)
    slots = ring_slots(positions, len(pages) * page_size)
    rows = _bytes_view(cache)[pages[slots // page_size].long(), slots % page_size]
    rows = rows.view(cache.dtype).to(dtype)
    return rows if scale is None else rows * scale.to(dtype).view(1, -1, 1)


def head_rows(x: Tensor | None) -> tuple[int, int, int]:
    """The struct HeadRows of csrc/launchers.h, of x (tokens, heads, head_dim)."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def ring_fields(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple:
    """The struct Ring of csrc/launchers.h."""

    def pages(cache: Tensor, scale: Tensor | None) -> tuple:
        step = scale is not None and scale.numel() > 1
        return cache.data_ptr(), *cache.stride()[:3], address(scale), int(step)

    return (
        pages(k_cache, k_scale),
        pages(v_cache, v_scale),
        block_table.data_ptr(),
        block_table.stride(0),
        block_table.shape[1],
        k_cache.shape[1],
        CACHE_DTYPES.index(k_cache.dtype),
    )


NO_RING = ((0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0), 0, 0, 0, 0, 0)  # a Ring of nulls


def check_cache(
    check: Arguments,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Checks the cache arguments that every attention op shares; binds `pages_per_seq`."""
    dims = ("pages", "page_size", "kv_heads", "head_dim")
    check.tensor("k_cache", k_cache, dims, (dtype, *QUANTISED))
    check.tensor("v_cache", v_cache, dims, (k_cache.dtype,))
    check.written("k_cache", k_cache)
    check.written("v_cache", v_cache)
    check.tensor("block_table", block_table, ("batch", "pages_per_seq"), (torch.int32,))
    if check.sizes["pages_per_seq"] < 1 or check.sizes["page_size"] < 1:
        raise ValueError(
            f"{check.op}: block_table and k_cache must hold at least one slot a sequence,"
            f" got pages_per_seq {block_table.shape[1]} and page_size {k_cache.shape[1]}"
        )
    quantised = k_cache.dtype in QUANTISED
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if quantised != (scale is not None):
            expected = "a (1,) or (kv_heads,) tensor" if quantised else "None"
            raise ValueError(
                f"{check.op}: {name} must be {expected} for a cache of {k_cache.dtype},"
                f" got {'None' if scale is None else 'a tensor'}"
            )
        if scale is not None:
            check.is_tensor(name, scale)
            size = 1 if scale.numel() == 1 else "kv_heads"
            check.tensor(name, scale, (size,), (torch.float32,))


def all_pages_exist(block_table: Tensor, cache: Tensor) -> bool:
    """Whether every table entry, in use or not, is a page (reads data: CPU tensors only).

    It spares an op the exact check, which costs far more: see `check_pages`.
    """
    if not block_table.numel():
        return True
    least, largest = block_table.aminmax()
    return int(least) >= 0 and int(largest) < cache.shape[0]


def check_pages(op: str, block_table: Tensor, sequences: Tensor, slots: Tensor, cache: Tensor):
    """Refuses table entries outside the cache, for slots in use (reads data: CPU tensors only)."""
    pages = block_table[sequences, slots // cache.shape[1]]
    bad = (pages < 0) | (pages >= cache.shape[0])
    if bad.any():
        raise ValueError(
            f"{op}: block_table must hold pages in [0, {cache.shape[0]}) for slots in use,"
            f" got {int(pages[bad][0])} for sequence {int(sequences[bad][0])}"
        )


def check_ragged(op: str, cu_seqlens: Tensor, context_lens: Tensor | None, tokens: int) -> None:
    """Refuses offsets that do not cover the packed rows (reads data: CPU tensors only)."""
    offsets = cu_seqlens.tolist()
    rising = all(a <= b for a, b in zip(offsets, offsets[1:], strict=False))
    if offsets[0] != 0 or offsets[-1] != tokens or not rising:
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to tokens={tokens}, got {offsets}")
    if context_lens is not None and bool((context_lens < 0).any()):
        raise ValueError(f"{op}: context_lens must be >= 0, got {context_lens.tolist()}")
