"""One sequence's keys cut into splits, each worked by a block, and their partials added up.

Keys are cut into tiles at absolute multiples of BLOCK_N, and runs of tiles into splits, newest
last. Five tiles of which a window touches four, cut into splits of three:

    tiles 0 [1 2 3] [4]      first_tile 1, stop_tile 5, live 2: block 1 is the newest

The ring's capacity bounds the grid and decides nothing else, so neither do bits depend on it.
A partial of a head is its largest score, its sum of weights and its weighted values, all fp32; the
block that counts last reads them past L1 and adds them up, oldest split first.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.processor import processor

MAX_SPLITS = 64
SHARE = 32  # counters take the first 32nd of a workspace


class Plan(NamedTuple):
    """How the keys of a call are cut."""

    splits: int  # of the grid, at least those of any sequence
    most_splits: int  # that a sequence may have
    tiles_at_least: int  # of a split


def block_slots(device: torch.device, batch_invariant: bool) -> int | None:
    """Blocks that run at once, two a multiprocessor; None where a cut must not depend on them."""
    return None if batch_invariant else 2 * processor(device)[1]


def shortest_split(slots: int | None) -> int:
    """Keys that are worth a block of their own; `slots` as for `plan`."""
    return 256 if slots is None else 128


@functools.cache
def plan(pairs: int, width: int, block_n: int, slots: int | None) -> Plan:
    """Cuts `width` keys for `pairs` = batch * kv_heads on a GPU that runs `slots` blocks at once.

    The cut of a sequence depends on its own keys and on `most_splits` only: on `slots` None, which
    is batch_invariant, on nothing else. Splits of 256 keys then, longer beyond 64 of them.
    """
    at_least = max(shortest_split(slots) // block_n, 1)
    if slots is None:
        most_splits = MAX_SPLITS
    else:

        def busy(splits: int) -> float:
            blocks = pairs * splits
            return blocks / (triton.cdiv(blocks, slots) * slots)

        # One full wave for few pairs; for many what leaves the last wave fullest, at most 4 splits.
        most_splits = max(range(1, min(max(slots // pairs, 4), MAX_SPLITS) + 1), key=busy)
    most_tiles = triton.cdiv(width, block_n) + 1  # the window need not begin at a tile
    return Plan(min(most_splits, triton.cdiv(most_tiles, at_least)), most_splits, at_least)


def counter_share(workspace: int) -> int:
    """Bytes at the front of a workspace of so many bytes that counters take."""
    return workspace // SHARE // 16 * 16


def workspace_bytes(pairs: int, splits: int, group: int, head_dim: int) -> int:
    """Bytes of workspace that a grid (pairs, splits) wants: counters, then partials.

    The counters' part is a fixed share of a workspace, so that no call writes a partial where a
    larger call counts: one workspace, zeroed once, serves calls of any sizes in turn.
    """
    partials = 4 * pairs * splits * group * (head_dim + 2)
    counters = 4 * pairs + 16  # the share is cut to a multiple of 16
    return max(counters * SHARE, triton.cdiv(partials * SHARE, SHARE - 1))


def enough_workspace(pairs: int, group: int, head_dim: int, width: int, slots: int | None) -> int:
    """Bytes of workspace for every call of up to `pairs` pairs and `width` keys in tiles up to 64.

    A kernel may work a group in parts of up to 8 heads, all of one size.
    """
    heads = triton.next_power_of_2(group)  # no less than all parts have
    splits = min(triton.cdiv(width, shortest_split(slots)) + 1, MAX_SPLITS)
    blocks = pairs * splits if slots is None else min(pairs * splits, max(slots, 4 * pairs))
    counters = workspace_bytes(pairs * heads, 0, group, head_dim)
    return max(counters, workspace_bytes(1, blocks, heads, head_dim))


def workspace_for(
    q: torch.Tensor,
    workspace: torch.Tensor | None,
    pairs: int,
    cut: Plan,
    group: int,
    head_dim: int,
) -> torch.Tensor | None:
    """The caller's workspace, a new one where there is none, or None if `cut` has one split only.

    Raises:
        ValueError: workspace is too small or misaligned.
    """
    if workspace is not None and workspace.data_ptr() % 16:
        raise ValueError(
            "decode_attention: workspace must begin at a multiple of 16 bytes,"
            f" got {workspace.data_ptr() % 16} behind one"
        )
    if cut.splits == 1:
        return None
    needed = workspace_bytes(pairs, cut.splits, group, head_dim)
    if workspace is None:
        return q.new_zeros(needed, dtype=torch.uint8)
    if workspace.numel() < needed:
        raise ValueError(
            f"decode_attention: workspace must have at least {needed} bytes for this call,"
            f" got {workspace.numel()}"
        )
    return workspace


@triton.jit
def partial_pointers(ptr, GROUP: tl.constexpr):
    """Where largest scores, sums of weights and weighted values of all splits begin."""
    rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * GROUP
    tops_ptr = ptr.to(tl.pointer_type(tl.float32))
    return tops_ptr, tops_ptr + rows, tops_ptr + 2 * rows


@triton.jit
def reduce_partials(
    tops_ptr,
    totals_ptr,
    accs_ptr,
    first,  # i64, the first split of this head in all of the grid
    live,  # i32, splits
    offs_h,  # heads of the group
    offs_d,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    REDUCE_HEADS: tl.constexpr,  # power of two, at least GROUP
    REDUCE_SPLITS: tl.constexpr,  # partials read at once
    BLOCK_D: tl.constexpr,
):
    """Weighted values, sum of weights and largest score over all splits of one head's group."""
    offs_s = tl.arange(0, REDUCE_SPLITS)
    top = tl.full((REDUCE_HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((REDUCE_HEADS,), tl.float32)
    acc = tl.zeros((REDUCE_HEADS, BLOCK_D), tl.float32)
    for begin in tl.range(0, live, REDUCE_SPLITS, num_stages=1):
        there = (begin + offs_s < live)[:, None] & (offs_h < GROUP)[None, :]
        at = (first + begin + offs_s)[:, None] * GROUP + offs_h[None, :]
        tops = tl.load(tops_ptr + at, mask=there, other=-float("inf"), cache_modifier=".cg")
        totals = tl.load(totals_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
        elements = at[:, :, None] * HEAD_DIM + offs_d[None, None, :]
        mask = there[:, :, None] & (offs_d < HEAD_DIM)[None, None, :]
        accs = tl.load(accs_ptr + elements, mask=mask, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf would be NaN
        keep, shares = tl.exp2(top - base), tl.exp2(tops - base[None, :])
        total = total * keep + tl.sum(shares * totals, axis=0)
        acc = acc * keep[:, None] + tl.sum(shares[:, :, None] * accs, axis=0)
        top = new_top
    return acc, total, top


@triton.jit
def store_outputs(out_ptr, lse_ptr, offs_row, mask_row, offs_d, acc, total, top, HEAD_DIM):
    """Divides by the sum of weights and writes out and lse; no weight at all: 0 and -inf."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    mask = mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(out_ptr + offs_row[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask)
    lse = tl.where(empty, -float("inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse_ptr + offs_row, lse, mask=mask_row)
