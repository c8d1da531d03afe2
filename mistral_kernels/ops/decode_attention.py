"""One new token a sequence: rotate it, write it into the ring, attend over its window, in one call.

    q, k   = rope(q, k, position)              unless cos is None: already rotated
    ring[position % capacity] = k, v           unless k is None: already written
    out    = softmax(q . keys * scale) values  over position - window < j <= position, j >= start

The slot that the write overwrites held position - capacity, which is outside the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.ops.checks import Arguments, compute_dtype
from mistral_kernels.ops.dispatch import (
    KERNEL_DTYPES,
    Cell,
    address,
    cpu_queue,
    cuda_queue,
    define,
    device_capability,
    native_extension,
    prefer,
)
from mistral_kernels.ops.masked_attention import (
    empty_outputs,
    masked_attention,
    triton_refuses,
)
from mistral_kernels.ops.ring import (
    all_pages_exist,
    check_cache,
    check_pages,
    head_rows,
    read_ring,
    ring_fields,
    ring_slots,
    write_ring,
)
from mistral_kernels.ops.rope import check_rope_positions, check_rope_tables, rope_reference

# Of the CUDA kernel: the columns and the rows of a tensor cores' product.
MMA_HEADS = 8
PAGE_ROWS = 16
CUDA_DTYPES = (torch.bfloat16, torch.float16)
NO_SPLITS = (0, 0, 0, 0, 0, 0)  # a KeySplits of nulls


def _width(window: int | None, capacity: int) -> int:
    """Keys that a token sees once there are as many."""
    return capacity if window is None else min(window, capacity)


def _key_range(position: int, start: int, capacity: int, window: int | None) -> tuple[int, int]:
    """Positions first..position that the newest token sees; empty when first > position."""
    return max(start, 0, position - _width(window, capacity) + 1), position


def decode_attention_reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    window: int | None,
    starts: Tensor | None,
    q_scale: Tensor | None,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    workspace: Tensor | None,  # for split partials, of which the reference has none
    batch_invariant: bool,  # holds always: each sequence is worked alone
) -> tuple[Tensor, Tensor]:
    if cos is not None:
        new_k = q[:, :0] if k is None else k
        q, rotated = rope_reference(q, new_k, cos, sin, positions, interleaved, q_scale)
        k = None if k is None else rotated
    live = (positions >= 0).nonzero().squeeze(-1)
    if k is not None:
        where = (block_table, live, positions[live].long())
        write_ring(k[live], k_cache, *where, k_scale)
        write_ring(v[live], v_cache, *where, v_scale)
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    capacity = block_table.shape[1] * k_cache.shape[1]
    dtype = compute_dtype(q.dtype)
    for b in live.tolist():
        start = 0 if starts is None else int(starts[b])
        first, last = _key_range(int(positions[b]), start, capacity, window)
        if first > last:
            continue
        keys = read_ring(k_cache, block_table[b], first, last, k_scale, dtype)
        values = read_ring(v_cache, block_table[b], first, last, v_scale, dtype)
        visible = keys.new_ones(1, len(keys), dtype=torch.bool)
        out[b : b + 1], lse[b : b + 1] = masked_attention(
            q[b : b + 1], keys, values, visible, scale
        )
    return out, lse


def _launch(
    launcher, queue, cut, q, k, v, k_cache, v_cache, block_table, positions, cos, sin, interleaved,
    window, starts, q_scale, scale, k_scale, v_scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Calls the C++ or CUDA launcher; `cut` is the struct KeySplits, `queue` where it runs."""
    out, lse = empty_outputs(q)
    batch, q_heads, head_dim = q.shape
    launcher(
        head_rows(q),
        head_rows(k),
        head_rows(v),
        out.data_ptr(),
        lse.data_ptr(),
        ring_fields(k_cache, v_cache, block_table, k_scale, v_scale),
        positions.data_ptr(),
        address(starts),
        address(cos),
        address(sin),
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        address(q_scale),
        interleaved,
        batch,
        q_heads,
        k_cache.shape[2],
        head_dim,
        _width(window, block_table.shape[1] * k_cache.shape[1]),
        scale,
        KERNEL_DTYPES.index(q.dtype),  # the order of csrc/dtype.h
        cut,
        *queue,
    )
    return out, lse


def _decode_attention_cpu(*inputs):
    *inputs, _, _ = inputs  # its splits need no workspace and depend on no batch
    return _launch(native_extension().decode_attention_cpu, cpu_queue(), NO_SPLITS, *inputs)


def _decode_attention_cuda(*inputs):
    *inputs, workspace, batch_invariant = inputs
    q, _, _, k_cache, _, block_table, _, _, _, _, window, *_ = inputs
    width = _width(window, block_table.shape[1] * k_cache.shape[1])
    # The workspace must outlive the launch, whoever made it: `cut` holds only its address.
    workspace, cut = _key_splits(q, k_cache, width, workspace, batch_invariant)
    return _launch(native_extension().decode_attention_cuda, cuda_queue(q.device), cut, *inputs)


def _key_splits(
    q: Tensor, k_cache: Tensor, width: int, workspace: Tensor | None, batch_invariant: bool
) -> tuple[Tensor | None, tuple]:
    """The workspace, and the struct KeySplits: a cut as the Triton kernel's, that both may share
    a workspace."""
    from mistral_kernels.kernels import decode_attention as kernel

    batch, q_heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    if page_size % PAGE_ROWS:  # a model's cache may be older than its choice of a backend
        raise ValueError(f"decode_attention: {_page_size_refused(page_size)}")
    # A block works up to 8 heads of a group; larger groups are parted evenly.
    group = q_heads // kv_heads
    parts = -(-group // MMA_HEADS)
    heads = -(-group // parts)
    blocks = batch * kv_heads * parts
    block_n = 32 if head_dim > 128 and k_cache.itemsize == 2 else 64  # kBlockN of the kernel
    slots = kernel.block_slots(q.device, batch_invariant)
    cut = kernel.plan(max(blocks, 1), width, block_n, slots)
    workspace = kernel.workspace_for(q, workspace, blocks, cut, heads, head_dim)
    counter_bytes = 0 if workspace is None else kernel.counter_share(workspace.numel())
    return workspace, (address(workspace), counter_bytes, *cut, heads)


def _page_size_refused(page_size: int) -> str:
    return f"it takes page_size that are multiples of {PAGE_ROWS}, got {page_size}"


def _cuda_refuses(facts: dict[str, int]) -> str | None:
    head_dim, page_size = facts.get("head_dim", 64), facts.get("page_size", 16)
    if head_dim > 256 or head_dim % 8:
        return f"it takes head_dim up to 256 that are multiples of 8, got {head_dim}"
    if page_size % PAGE_ROWS:
        return _page_size_refused(page_size)
    if not facts.get("aligned", 1):
        return "it takes rows of a cache that begin at multiples of 16 bytes"
    return None


def _decode_attention_triton(q, *rest):
    from mistral_kernels.kernels import decode_attention as kernel

    out, lse = empty_outputs(q)
    kernel.decode_attention(q, *rest, out, lse)
    return out, lse


def _triton_refuses(facts: dict[str, int]) -> str | None:
    from mistral_kernels.kernels.decode_attention import MAX_GROUP

    return triton_refuses(facts, MAX_GROUP)


def _facts(q, k, v, k_cache, v_cache, *_):
    starts = k_cache.data_ptr() | v_cache.data_ptr()
    for cache in (k_cache, v_cache):
        for steps in (q.shape[2], *cache.stride()[:3]):
            starts |= steps * cache.itemsize
    return (
        ("head_dim", q.shape[2]),
        ("group", q.shape[1] // k_cache.shape[2]),
        ("page_size", k_cache.shape[1]),
        ("aligned", int(starts % 16 == 0)),  # what the CUDA kernel copies 16 bytes at a time
    )


def _check_values(
    q, k, v, k_cache, v_cache, block_table, positions, cos, sin, interleaved, window, starts, *_
):
    if cos is not None:
        check_rope_positions("decode_attention", positions, cos)
    if all_pages_exist(block_table, k_cache):
        return
    capacity = block_table.shape[1] * k_cache.shape[1]
    for b, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        start = 0 if starts is None else int(starts[b])
        first, last = _key_range(position, start, capacity, window)
        # The slot of the new token is written even when `starts` hides it.
        slots = ring_slots(torch.arange(min(first, last), last + 1), capacity)
        check_pages("decode_attention", block_table, torch.full_like(slots, b), slots, k_cache)


_decode_attention = define(
    "decode_attention",
    "Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_table,"
    " Tensor positions, Tensor? cos, Tensor? sin, bool interleaved, int? window, Tensor? starts,"
    " Tensor? q_scale, float scale, Tensor? k_scale, Tensor? v_scale, Tensor(c!)? workspace,"
    " bool batch_invariant",
    "(Tensor, Tensor)",
    fake=empty_outputs,
    cells={
        "reference": Cell(decode_attention_reference, waits=True),
        "cpu": Cell(_decode_attention_cpu),
        "triton": Cell(_decode_attention_triton, refuses=_triton_refuses),
        "cuda": Cell(_decode_attention_cuda, CUDA_DTYPES, refuses=_cuda_refuses),
    },
    facts=_facts,
    check_values=_check_values,
)


def decode_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    q_scale: Tensor | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    workspace: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RoPE, ring write and windowed grouped-query attention of one token a sequence.

    Args:
        q: (batch, q_heads, head_dim), float32, bfloat16 or float16 (float64 on the reference).
        k, v: (batch, kv_heads, head_dim), q's dtype; None: already in the cache.
        k_cache, v_cache: (pages, page_size, kv_heads, head_dim), any memory order, written in
            place; q's dtype, or int8 or float8_e4m3fn with scales (the new key is attended as
            stored).
        block_table: (batch, pages_per_seq), int32.
        positions: (batch,), int32, of the new token; a row with a negative one is idle: its out is
            0, its lse -inf, and nothing is written.
        cos, sin: (max_positions, head_dim / 2), float32; None: q and k are rotated already.
        interleaved: layout of the rotated pairs, see `rope`.
        window: keys the token sees, itself included; None for all that the ring holds.
        starts: (batch,), int32, first visible position of each sequence; None for 0.
        q_scale: (max_positions,), float32, see `rope`; needs cos and sin.
        scale: factor of q . k; None for head_dim ** -0.5.
        k_scale, v_scale: (1,) or (kv_heads,), float32, of a quantised cache.
        workspace: (bytes,), uint8, zeroed once, for the calls of one stream, of any sizes in turn;
            one that is too small or does not begin at a multiple of 16 bytes is refused. None: the
            op makes its own. See `decode_attention_workspace_bytes`.
        batch_invariant: a sequence's bits do not depend on its neighbours in the batch.
        backend: "auto" or a backend's name.

    Returns:
        out: (batch, q_heads, head_dim), q's dtype.
        lse: (batch, q_heads), float32, natural log.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
        RuntimeError: an input requires grad.

    Source: Jiang et al. 2023, arXiv 2310.06825 (rolling buffer cache); Su et al. 2021 (RoPE).
    """
    op = "decode_attention"
    check = Arguments(op)
    check.tensor("q", q, ("batch", "q_heads", "head_dim"))
    if check.together(k=k, v=v):
        check.tensor("k", k, ("batch", "kv_heads", "head_dim"), (q.dtype,))
        check.tensor("v", v, ("batch", "kv_heads", "head_dim"), (q.dtype,))
    check_cache(check, k_cache, v_cache, block_table, k_scale, v_scale, q.dtype)
    check.group()
    check.tensor("positions", positions, ("batch",), (torch.int32,))
    if check.together(cos=cos, sin=sin):
        check_rope_tables(check, cos, sin, q_scale, q)
    elif q_scale is not None:
        raise ValueError(f"{op}: q_scale must be None without cos and sin, got a tensor")
    check.flag("interleaved", interleaved)
    check.window(window)
    if starts is not None:
        check.tensor("starts", starts, ("batch",), (torch.int32,))
    scale = check.scale(scale, q.shape[-1])
    if workspace is not None:
        check.tensor("workspace", workspace, ("bytes",), (torch.uint8,))
    check.flag("batch_invariant", batch_invariant)
    check.backend(backend)
    return _decode_attention(
        q, k, v, k_cache, v_cache, block_table, positions, cos, sin, interleaved, window, starts,
        q_scale, scale, k_scale, v_scale, workspace, batch_invariant, backend,
    )  # fmt: skip


def decode_attention_workspace_bytes(
    k_cache: Tensor,
    block_table: Tensor,
    *,
    q_heads: int,
    window: int | None,
    dtype: torch.dtype,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> int:
    """How large a workspace serves every `decode_attention` on one cache, of any of its sequences.

    Args:
        k_cache, block_table, window: as for `decode_attention`.
        q_heads: heads of q.
        dtype: q's.
        batch_invariant: as for `decode_attention`.
        backend: "auto" or a backend's name, which is a preference here.

    Returns:
        Bytes; 0 if the backend that will serve needs none. The largest number of several caches is
        enough for calls on all of them in turn.
    """
    batch, pages_per_seq = block_table.shape
    _, page_size, kv_heads, head_dim = k_cache.shape
    group, device = q_heads // kv_heads, k_cache.device
    served_by = prefer(
        "decode_attention",
        device_type=device.type,
        capability=device_capability(device),
        dtype=dtype,
        facts=(("head_dim", head_dim), ("group", group), ("page_size", page_size)),
        backend=backend,
    )
    if served_by in ("reference", "cpu"):
        return 0
    from mistral_kernels.kernels import decode_attention as kernel

    sizes = batch * kv_heads, group, head_dim, _width(window, pages_per_seq * page_size)
    return kernel.largest_workspace(*sizes, device, batch_invariant)
