"""Attention of many new tokens a sequence, packed and ragged, over the ring and their own keys.

    out_i = sum_j softmax_j(q_i . k_j * scale) v_j     over i - window < j <= i, j >= start

The keys are the ring's, written before this call, and the call's own k and v. Storing a chunk first
would destroy keys that its early rows still need; so attend, then `store_kv_`. With a lookahead of
chunk - 1 slots beyond the window, storing first and passing k = v = None is as good.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mistral_kernels.ops.checks import Arguments, compute_dtype
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    address,
    cpu_queue,
    define,
    native_extension,
)
from mistral_kernels.ops.masked_attention import (
    attention_probabilities,
    empty_outputs,
    masked_attention,
    triton_refuses,
    visible_keys,
)
from mistral_kernels.ops.ring import (
    NO_RING,
    all_pages_exist,
    check_cache,
    check_pages,
    check_ragged,
    head_rows,
    read_ring,
    ring_fields,
    ring_slots,
)

QUERY_BLOCK = 256  # rows worked at once: bounds the score matrix, so that memory grows linearly


def _key_range(sequence, tokens, k, k_cache, block_table, context_lens, starts, window):
    """(low, context, total): positions low..total-1 are seen; those < context are the ring's."""
    context = 0 if context_lens is None else int(context_lens[sequence])
    total = context + tokens
    low = 0 if window is None else max(0, context - window + 1)
    if starts is not None:
        low = max(low, int(starts[sequence]))
    if k_cache is not None:
        # What a ring narrower than the window no longer holds is not attended.
        written = total if k is None else context
        low = max(low, written - block_table.shape[1] * k_cache.shape[1])
    return min(low, total), context, total


def _gather_keys(new, cache, pages, scale, low, context, total, begin, dtype) -> Tensor:
    """Rows of positions low..total-1 in position order: from the ring, then from the new tokens."""
    ring_end = total if new is None else context
    parts = []
    if cache is not None and low < ring_end:
        parts.append(read_ring(cache, pages, low, ring_end - 1, scale, dtype))
    if new is not None:
        parts.append(new[begin + max(low - context, 0) : begin + total - context].to(dtype))
    return torch.cat(parts) if parts else cache.new_empty(0, *cache.shape[2:], dtype=dtype)


def prefill_attention_reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    block_table: Tensor | None,
    context_lens: Tensor | None,
    starts: Tensor | None,
    window: int | None,
    causal: bool,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    batch_invariant: bool,  # holds always: each sequence is worked alone, in blocks of fixed size
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(q)
    dtype = compute_dtype(q.dtype)
    for b, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        span = _key_range(b, end - begin, k, k_cache, block_table, context_lens, starts, window)
        low, context, total = span
        pages = None if block_table is None else block_table[b]
        keys = _gather_keys(k, k_cache, pages, k_scale, *span, begin, dtype)
        values = _gather_keys(v, v_cache, pages, v_scale, *span, begin, dtype)
        positions = torch.arange(low, total, device=q.device)
        for row in range(begin, end, QUERY_BLOCK):
            rows = slice(row, min(row + QUERY_BLOCK, end))
            first, stop = context + row - begin, context + rows.stop - begin
            seen_from = low if window is None else max(low, first - window + 1)
            seen = slice(seen_from - low, max(stop, seen_from) - low if causal else None)
            queries = torch.arange(first, stop, device=q.device)
            visible = visible_keys(queries, positions[seen], window=window, causal=causal)
            out[rows], lse[rows] = masked_attention(
                q[rows], keys[seen], values[seen], visible, scale
            )
    return out, lse


def _refuse_cache(k_cache: Tensor | None) -> None:
    if k_cache is not None:
        raise RuntimeError("prefill_attention: it has no backward with k_cache; detach q, k and v")


def prefill_attention_backward(
    grads: list[Tensor], needs, q, k, v, cu_seqlens, k_cache, _v_cache, _table, _context, starts,
    window, causal, scale, *_,
):  # fmt: skip
    """Gradients of the cache-less form: p recomputed, then the chain rule through the softmax."""
    _refuse_cache(k_cache)
    dtype = compute_dtype(q.dtype)
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    for b, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        low = min(0 if starts is None else max(0, int(starts[b])), end - begin)
        positions = torch.arange(low, end - begin, device=q.device)
        for row in range(begin, end, QUERY_BLOCK):
            rows = slice(row, min(row + QUERY_BLOCK, end))
            queries = torch.arange(row - begin, rows.stop - begin, device=q.device)
            visible = visible_keys(queries, positions, window=window, causal=causal)
            grouped = (len(queries), k.shape[1], -1, q.shape[2])
            block_q = q[rows].to(dtype).view(grouped)
            d_out = grads[0][rows].to(dtype).reshape(grouped)
            d_lse = grads[1][rows].to(dtype).view(*grouped[:3]).permute(1, 2, 0)
            keys, values = (x[begin + low : end].to(dtype) for x in (k, v))
            p, _ = attention_probabilities(block_q, keys, visible, scale)
            d_p = torch.einsum("qhgd,khd->hgqk", d_out, values)
            mean = (p * d_p).sum(-1, keepdim=True)
            d_scores = p * (d_p - mean + d_lse[..., None]) * scale
            d_q[rows] = torch.einsum("hgqk,khd->qhgd", d_scores, keys).reshape(q[rows].shape)
            d_k[begin + low : end] += torch.einsum("hgqk,qhgd->khd", d_scores, block_q)
            d_v[begin + low : end] += torch.einsum("hgqk,qhgd->khd", p, d_out)
    return d_q, d_k, d_v


def _prefill_attention_cpu(
    q, k, v, cu_seqlens, k_cache, v_cache, block_table, context_lens, starts, window, causal,
    scale, k_scale, v_scale, *_,
):  # fmt: skip
    """Calls the C++ launcher: raw pointers, sizes, strides, the ring, and where to run it."""
    out, lse = empty_outputs(q)
    ring = NO_RING
    if k_cache is not None:
        ring = ring_fields(k_cache, v_cache, block_table, k_scale, v_scale)
    native_extension().prefill_attention_cpu(
        head_rows(q),
        head_rows(k),
        head_rows(v),
        out.data_ptr(),
        lse.data_ptr(),
        cu_seqlens.data_ptr(),
        address(context_lens),
        address(starts),
        len(cu_seqlens) - 1,
        q.shape[0],
        q.shape[1],
        (k_cache if k is None else k).shape[-2],
        q.shape[2],
        window or 0,
        causal,
        scale,
        KERNEL_DTYPES.index(q.dtype),  # the order of csrc/dtype.h
        ring,
        *cpu_queue(),
    )
    return out, lse


def _prefill_attention_triton(q, *inputs):
    from mistral_kernels.kernels import prefill_attention as kernel

    out, lse = empty_outputs(q)
    kernel.prefill_attention(q, *inputs, out, lse)
    return out, lse


def _prefill_attention_backward_triton(grads: list[Tensor], needs, *inputs):
    from mistral_kernels.kernels import prefill_attention as forward
    from mistral_kernels.kernels import prefill_attention_backward as kernel

    q, k, v, cu_seqlens, k_cache, _, _, _, starts, window, causal, scale, *_ = inputs
    _refuse_cache(k_cache)
    out = q.new_empty(q.shape, dtype=torch.float32)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    forward.prefill_attention(*inputs, out, lse)
    d_out, d_lse = (grad.contiguous() for grad in grads)  # autograd hands over expanded scalars too
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    kernel.prefill_attention_backward(
        q, k, v, d_out, out, lse, d_lse, cu_seqlens, starts, window, causal, scale, d_q, d_k, d_v
    )
    return d_q, d_k, d_v


def _facts(q, k, v, cu_seqlens, k_cache, *_):
    kv = k if k is not None else k_cache
    facts = (("head_dim", q.shape[2]), ("group", q.shape[1] // max(1, kv.shape[-2])))
    return facts if k_cache is None else (*facts, ("page_size", k_cache.shape[1]))


def _check_values(
    q, k, v, cu_seqlens, k_cache, v_cache, block_table, context_lens, starts, window, *_
):
    check_ragged("prefill_attention", cu_seqlens, context_lens, len(q))
    if k_cache is None:
        return
    capacity = block_table.shape[1] * k_cache.shape[1]
    pages_exist = all_pages_exist(block_table, k_cache)
    for b, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        low, context, total = _key_range(
            b, end - begin, k, k_cache, block_table, context_lens, starts, window
        )
        # What the first row sees if nothing had been overwritten: the range without a ring.
        first, _, _ = _key_range(b, end - begin, k, None, None, context_lens, starts, window)
        if k is None and end - begin > 1 and first < low:
            raise ValueError(
                f"prefill_attention: k and v must be given, or the ring keep a lookahead of"
                f" {end - begin - 1} tokens, for sequence {b}: its capacity is {capacity} and its"
                f" first row sees back to position {first}, which was overwritten"
            )
        if pages_exist:
            continue
        slots = ring_slots(torch.arange(low, max(low, total if k is None else context)), capacity)
        check_pages("prefill_attention", block_table, torch.full_like(slots, b), slots, k_cache)


_prefill_attention = define(
    "prefill_attention",
    "Tensor q, Tensor? k, Tensor? v, Tensor cu_seqlens, Tensor? k_cache, Tensor? v_cache,"
    " Tensor? block_table, Tensor? context_lens, Tensor? starts, int? window, bool causal,"
    " float scale, Tensor? k_scale, Tensor? v_scale, bool batch_invariant",
    "(Tensor, Tensor)",
    fake=empty_outputs,
    cells={
        "reference": prefill_attention_reference,
        "cpu": Cell(_prefill_attention_cpu),
        "triton": Cell(_prefill_attention_triton, refuses=triton_refuses),
    },
    facts=_facts,
    check_values=_check_values,
    differentiable=("q", "k", "v"),
    backward={
        "reference": prefill_attention_backward,
        "triton": Cell(_prefill_attention_backward_triton, refuses=triton_refuses),
    },
)


def prefill_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens: Tensor,
    *,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    block_table: Tensor | None = None,
    context_lens: Tensor | None = None,
    starts: Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Windowed grouped-query attention over packed sequences, with or without a rolling cache.

    Keys that a query does not see never count, NaN or not. But on triton a value (not a key) that
    is not finite spoils besides the rows that see it others of their query tile: of the same
    sequence, fewer than 128 tokens away; gradients likewise.

    Args:
        q: (tokens, q_heads, head_dim), rotated; float32, bfloat16 or float16 (float64 on the
            reference).
        k, v: (tokens, kv_heads, head_dim), q's dtype, k rotated; None: already in the cache.
        cu_seqlens: (batch + 1,), int32, offsets of the sequences, from 0 to tokens.
        k_cache, v_cache: (pages, page_size, kv_heads, head_dim), q's dtype, or int8 or
            float8_e4m3fn with scales; None: no cache. Given together with block_table and
            context_lens.
        block_table: (batch, pages_per_seq), int32.
        context_lens: (batch,), int32, tokens of each sequence in the cache before this call.
        starts: (batch,), int32, first visible position of each sequence; None for 0.
        window: keys a query sees, itself included; None for all.
        causal: False lets every query see every key of its sequence; no cache, no window then.
        scale: factor of q . k; None for head_dim ** -0.5.
        k_scale, v_scale: (1,) or (kv_heads,), float32, of a quantised cache.
        batch_invariant: a sequence's bits do not depend on its neighbours in the batch.
        backend: "auto" or a backend's name.

    Returns:
        out: (tokens, q_heads, head_dim), q's dtype; rows that see no key are 0.
        lse: (tokens, q_heads), float32, natural log; -inf where no key is seen.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
        RuntimeError: a cache is given and an input requires grad.

    Source: Vaswani et al. 2017; window and ring: Jiang et al. 2023, arXiv 2310.06825.
    """
    op = "prefill_attention"
    check = Arguments(op)
    check.tensor("q", q, ("tokens", "q_heads", "head_dim"))
    if check.together(k=k, v=v):
        check.tensor("k", k, ("tokens", "kv_heads", "head_dim"), (q.dtype,))
        check.tensor("v", v, ("tokens", "kv_heads", "head_dim"), (q.dtype,))
    cached = check.together(
        k_cache=k_cache, v_cache=v_cache, block_table=block_table, context_lens=context_lens
    )
    if cached:
        check_cache(check, k_cache, v_cache, block_table, k_scale, v_scale, q.dtype)
        check.tensor("context_lens", context_lens, ("batch",), (torch.int32,))
    elif k is None:
        raise ValueError(f"{op}: k and v must be tensors when there is no k_cache, got None")
    elif k_scale is not None or v_scale is not None:
        raise ValueError(f"{op}: k_scale and v_scale must be None without a k_cache, got a tensor")
    check.group()
    check.offsets("cu_seqlens", cu_seqlens)
    if starts is not None:
        check.tensor("starts", starts, ("batch",), (torch.int32,))
    check.window(window)
    check.flag("causal", causal)
    if not causal and (cached or window is not None):
        raise ValueError(f"{op}: causal must be True with a cache or a window, got False")
    scale = check.scale(scale, q.shape[-1])
    check.flag("batch_invariant", batch_invariant)
    check.backend(backend)
    if (
        cached
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in (q, k, v))
    ):
        raise RuntimeError(
            f"{op}: an input requires grad, but this op is differentiable only without k_cache;"
            " call it under torch.no_grad() or pass detached tensors"
        )
    return _prefill_attention(
        q, k, v, cu_seqlens, k_cache, v_cache, block_table, context_lens, starts, window, causal,
        scale, k_scale, v_scale, batch_invariant, backend,
    )  # fmt: skip
