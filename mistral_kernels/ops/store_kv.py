"""Writes new keys and values into the rolling paged cache.

Row i of sequence b has position context_lens[b] + i - cu_seqlens[b] and goes to slot
position % capacity. Of a chunk longer than the ring only the last `capacity` rows are written, so
no two rows share a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.checks import Arguments
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    cpu_queue,
    cuda_queue,
    define,
    native_extension,
)
from mistral_kernels.ops.ring import (
    all_pages_exist,
    check_cache,
    check_pages,
    check_ragged,
    head_rows,
    packed_rows,
    ring_fields,
    ring_slots,
    write_ring,
)


def _written_rows(k, k_cache, block_table, cu_seqlens, context_lens) -> tuple[Tensor, ...]:
    """Rows that are stored, with their sequence and position."""
    capacity = block_table.shape[1] * k_cache.shape[1]
    sequences, positions = packed_rows(cu_seqlens, context_lens, len(k))
    ends = cu_seqlens[1:][sequences].long()
    rows = torch.arange(len(k), device=k.device)
    kept = ((rows >= ends - capacity) & (positions >= 0)).nonzero().squeeze(-1)
    return kept, sequences[kept], positions[kept]


def store_kv_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    rows, sequences, positions = _written_rows(k, k_cache, block_table, cu_seqlens, context_lens)
    write_ring(k[rows], k_cache, block_table, sequences, positions, k_scale)
    write_ring(v[rows], v_cache, block_table, sequences, positions, v_scale)


def _store_kv_native(
    launch, k, v, k_cache, v_cache, block_table, cu_seqlens, context_lens, k_scale, v_scale, *queue
) -> None:
    """Calls the C++ or CUDA launcher: structs of pointers and strides, and where to run it."""
    launch(
        head_rows(k),
        head_rows(v),
        ring_fields(k_cache, v_cache, block_table, k_scale, v_scale),
        cu_seqlens.data_ptr(),
        context_lens.data_ptr(),
        context_lens.shape[0],
        *k.shape,
        KERNEL_DTYPES.index(k.dtype),  # the order of csrc/dtype.h
        *queue,
    )


def _store_kv_cpu(*inputs) -> None:
    _store_kv_native(native_extension().store_kv_cpu, *inputs, *cpu_queue())


def _store_kv_cuda(k, *rest) -> None:
    _store_kv_native(native_extension().store_kv_cuda, k, *rest, *cuda_queue(k.device))


def _store_kv_triton(k, v, *rest) -> None:
    from mistral_kernels.kernels import store_kv as kernel

    kernel.store_kv(k, v, *rest)


def _check_values(k, v, k_cache, v_cache, block_table, cu_seqlens, context_lens, *_) -> None:
    check_ragged("store_kv_", cu_seqlens, None, len(k))
    if all_pages_exist(block_table, k_cache):
        return
    _, sequences, positions = _written_rows(k, k_cache, block_table, cu_seqlens, context_lens)
    slots = ring_slots(positions, block_table.shape[1] * k_cache.shape[1])
    check_pages("store_kv_", block_table, sequences, slots, k_cache)


_store_kv_ = define(
    "store_kv_",
    "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table,"
    " Tensor cu_seqlens, Tensor context_lens, Tensor? k_scale, Tensor? v_scale",
    "()",
    fake=lambda *_: None,
    cells={
        "reference": store_kv_reference,
        "cpu": Cell(_store_kv_cpu),
        "triton": Cell(_store_kv_triton),
        "cuda": Cell(_store_kv_cuda),
    },
    facts=lambda k, v, k_cache, *_: (("head_dim", k.shape[2]), ("page_size", k_cache.shape[1])),
    check_values=_check_values,
)


def store_kv_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Stores packed new keys and values in the ring, in place.

    Args:
        k, v: (tokens, kv_heads, head_dim), float32, bfloat16 or float16 (float64 on the reference);
            k already rotated.
        k_cache, v_cache: (pages, page_size, kv_heads, head_dim), any memory order; k's dtype, or
            int8 or float8_e4m3fn with scales.
        block_table: (batch, pages_per_seq), int32; -1 where a page was never needed.
        cu_seqlens: (batch + 1,), int32, offsets of the sequences in k, from 0 to tokens.
        context_lens: (batch,), int32, tokens of each sequence in the cache before this call. A row
            whose position is negative is not stored.
        k_scale, v_scale: (1,) or (kv_heads,), float32: stored = round(value / scale), saturating.
        backend: "auto" or a backend's name.

    Returns:
        k_cache, v_cache.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
        RuntimeError: an input requires grad.

    Source: Jiang et al. 2023, arXiv 2310.06825, "rolling buffer cache".
    """
    check = Arguments("store_kv_")
    check.tensor("k", k, ("tokens", "kv_heads", "head_dim"))
    check.tensor("v", v, ("tokens", "kv_heads", "head_dim"), (k.dtype,))
    check_cache(check, k_cache, v_cache, block_table, k_scale, v_scale, k.dtype)
    check.offsets("cu_seqlens", cu_seqlens)
    check.tensor("context_lens", context_lens, ("batch",), (torch.int32,))
    check.backend(backend)
    _store_kv_(
        k, v, k_cache, v_cache, block_table, cu_seqlens, context_lens, k_scale, v_scale, backend
    )
    return k_cache, v_cache
