"""Cuts prefill_attention's keys into splits, and adds these up in the order of the keys.

A row reads 4 * (head_dim + 1) bytes a split and writes head_dim * itemsize: bound by memory. 4
tokens of 32 heads of 128 in 16 splits: 1.1 MB, 0.5, 0.3, 0.2 us on A100, H100, H200 (not measured),
less than the launch.
"""

import torch
import triton
import triton.language as tl

SPLIT_KEYS = 256  # of a split at least: 0.13 MB at head_dim 128, 16 times its partial; not measured
MAX_SPLITS = 64  # a program reads them one after another


def cut_keys(seen: int, held: int, busy: int, multiprocessors: int) -> tuple[int, int, int]:
    """Splits of the grid, how many a query tile's keys are cut into, and keys of one at least.

    1, 1 and 0 where keys are not split.

    Args:
        seen: keys that a window lets a tile see.
        held: keys that there can be: they bound the grid and decide nothing else.
        busy: programs that have queries, at least, if keys are not split.
    """
    most = min(multiprocessors // busy, MAX_SPLITS)
    if most < 2 or seen <= SPLIT_KEYS:
        return 1, 1, 0
    # A window need not begin at a tile's first key; tiles are no longer than SPLIT_KEYS.
    splits = min(most, triton.cdiv(min(seen, held), SPLIT_KEYS) + 1)
    return splits, most, SPLIT_KEYS


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_splits_kernel(
    partial_ptr,  # (splits, rows, head_dim), fp32, contiguous; undefined where the lse is -inf
    partial_lse_ptr,  # (splits, rows), fp32, contiguous
    out_ptr,  # (rows, head_dim), contiguous
    lse_ptr,  # (rows,), fp32, contiguous
    rows,  # tokens * q_heads
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (cdiv(rows, BLOCK_ROWS),). A program adds up its rows' splits in the order of keys."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_row = row < rows
    mask = mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for split in range(splits):
        part = row + tl.cast(split, tl.int64) * rows
        lse = tl.load(partial_lse_ptr + part, mask=mask_row, other=float("-inf"))
        live = mask & (lse > float("-inf"))[:, None]
        part_ptrs = partial_ptr + part[:, None] * HEAD_DIM + offs_d[None, :]
        values = tl.load(part_ptrs, mask=live, other=0.0)
        # Of one split alone the weight is 1: its bits are those of a row that was not split.
        new_largest = tl.maximum(largest, lse)
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        rescale, weight = tl.exp(largest - shift), tl.exp(lse - shift)
        acc = acc * rescale[:, None] + values * weight[:, None]
        total = total * rescale + weight
        largest = new_largest
    total = tl.where(total == 0, 1.0, total)  # no key: out 0, lse -inf + log(1)
    out_ptrs = out_ptr + row[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, largest + tl.log(total), mask=mask_row)


def tile_config(head_dim: int) -> dict[str, int]:
    """Four rows, 16 fp32 values a thread at head_dim 128, by one warp. Not measured."""
    return {"BLOCK_ROWS": 4, "BLOCK_D": triton.next_power_of_2(head_dim), "num_warps": 1}


def work(rows: int, splits: int, head_dim: int) -> tuple[int, int]:
    """Bytes that a call moves to bf16 rows, and its operations."""
    values = rows * splits * head_dim
    return 4 * values + 4 * rows * (splits + 1) + 2 * rows * head_dim, 3 * values


def combine_splits(
    partial: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Writes `out` and `lse`.

    Args:
        partial: (splits, *out.shape), float32, contiguous; undefined where partial_lse is -inf.
        partial_lse: (splits, *lse.shape), float32, contiguous.
        out: (tokens, q_heads, head_dim), contiguous.
        lse: (tokens, q_heads), float32, contiguous.
    """
    rows, head_dim = lse.numel(), out.shape[-1]
    config = tile_config(head_dim)
    combine_splits_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]),)](
        partial, partial_lse, out, lse, rows, len(partial), HEAD_DIM=head_dim, **config
    )


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: heads of 128."""
    pointers = {"partial_ptr": "*fp32", "partial_lse_ptr": "*fp32", "out_ptr": "*bf16"}
    return [
        {
            "case": "bf16",
            "kernel": combine_splits_kernel,
            "signature": pointers | {"lse_ptr": "*fp32", "rows": "i32", "splits": "i32"},
            "constexprs": {"HEAD_DIM": 128, **tile_config(128)},
            "due": (),
            "work": {"4 tokens of 32 heads of 128, 16 splits": work(128, 16, 128)},
        }
    ]
