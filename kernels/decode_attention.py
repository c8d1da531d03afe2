"""decode_attention in Triton: RoPE, ring write, windowed attention and reduction in one launch.

    out = softmax(q . keys * scale) values     keys at max(start, p - window + 1) .. p

A sequence moves 2 * keys * kv_heads * head_dim * itemsize bytes for 4 * keys * q_heads * head_dim
operations: bound by memory. Mistral 7B (32/8 heads of 128, bf16) reads 16.8 MB a sequence at window
4096; batch 1 / 8 / 32 predicted from bandwidth: A100 (1.6 TB/s of 2.0) 11 / 84 / 336 us, H100
(2.8 of 3.35) 6 / 48 / 192, H200 (4.0 of 4.8) 4 / 34 / 134, plus about 4 us at batch 1 for the chain
of latencies (launch, table, keys, counter, partials). Not measured.
"""

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.attention_tiles import LOG2_E, attend_tiles
from mistral_kernels.kernels.cache_elements import (
    CACHE_FORMATS,
    as_codes,
    as_stored,
    expanded,
    load_turned,
    page_and_row,
)
from mistral_kernels.kernels.key_splits import (
    MAX_SPLITS,
    block_slots,
    counter_share,
    enough_workspace,
    partial_pointers,
    plan,
    reduce_partials,
    store_outputs,
    workspace_for,
)
from mistral_kernels.kernels.processor import processor, shared_bytes

MAX_GROUP = 32  # in tiles of 64 rows ptxas puts a wait behind every wgmma on sm_90


# What changes from call to call must not compile the kernel anew.
@triton.jit(do_not_specialize=["capacity", "width", "tiles_at_least", "most_splits"])
def decode_attention_kernel(
    q_ptr,  # (batch, q_heads, head_dim)
    k_ptr,  # (batch, kv_heads, head_dim); None: in the cache already
    v_ptr,  # like k
    out_ptr,  # (batch, q_heads, head_dim), contiguous
    lse_ptr,  # (batch, q_heads) fp32, contiguous
    k_cache_ptr,  # (pages, page_size, kv_heads, head_dim); fp8 as uint8
    v_cache_ptr,  # like k_cache
    block_table_ptr,  # (batch, pages_per_seq) i32
    positions_ptr,  # (batch,) i32
    starts_ptr,  # (batch,) i32, or None
    cos_ptr,  # (max_positions, head_dim / 2) fp32; None: q and k are turned already
    sin_ptr,  # like cos
    q_scale_ptr,  # (max_positions,) fp32, or None
    k_scale_ptr,  # (1,) or (kv_heads,) fp32; None without CACHE_FORMAT
    v_scale_ptr,  # like k_scale
    workspace_ptr,  # bytes: counters i32, then partials fp32; None with a grid of one split
    kv_heads,  # i32
    capacity,  # i32, slots of a sequence
    width,  # i32, keys that a token sees: min(window, capacity)
    scale,  # fp32, with log2(e): the weights are powers of 2
    tiles_at_least,  # i32, tiles of a split
    most_splits,  # i32, of one sequence
    counter_bytes,  # i32
    stride_q_batch,
    stride_q_head,
    stride_k_batch,
    stride_k_head,
    stride_v_batch,
    stride_v_head,
    stride_k_page,
    stride_k_slot,
    stride_k_cache_head,
    stride_v_page,
    stride_v_slot,
    stride_v_cache_head,
    stride_table_batch,
    stride_cos,
    stride_sin,
    stride_k_scale,  # 0 for one scale
    stride_v_scale,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: one page a sequence
    INTERLEAVED: tl.constexpr,
    CACHE_FORMAT: tl.constexpr,  # "int8", "fp8", or None for q's dtype
    BLOCK_M: tl.constexpr,  # heads of the group, padded to what tl.dot takes
    BLOCK_N: tl.constexpr,  # keys of a tile
    BLOCK_D: tl.constexpr,  # power of two, at least head_dim
    REDUCE_HEADS: tl.constexpr,  # heads of the group, padded
    REDUCE_SPLITS: tl.constexpr,  # partials read at once
):
    """Grid (batch * kv_heads, splits). A program owns one split of one kv head of one sequence.

    The last program of a kv head to finish also owns its reduction.
    """
    # Which keys: old ones first .. position - 1, in tiles of this split; the new one apart.
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < GROUP, (offs_d < HEAD_DIM)[None, :]
    position = tl.load(positions_ptr + batch)
    if position < 0:
        if split == 0:
            nothing = tl.zeros((BLOCK_M,), tl.float32)
            idle = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            rows = pair * GROUP + offs_m
            store_outputs(out_ptr, lse_ptr, rows, mask_m, offs_d, idle, nothing, nothing, HEAD_DIM)
        return
    first = tl.maximum(position - width + 1, 0)
    if starts_ptr is not None:
        first = tl.maximum(first, tl.load(starts_ptr + batch))
    first_tile = tl.minimum(first, position) // BLOCK_N
    stop_tile = tl.cdiv(position, BLOCK_N)
    tiles = tl.maximum(stop_tile - first_tile, 0)
    tiles_per_split = tl.maximum(tiles_at_least, tl.cdiv(tiles, most_splits))
    live = tl.maximum(tl.cdiv(tiles, tiles_per_split), 1)
    if split >= live:
        return
    begin_tile = first_tile + split * tiles_per_split
    end_tile = tl.minimum(begin_tile + tiles_per_split, stop_tile)

    # q, turned by every block for itself, in its own dtype as the model rounds it.
    dtype = q_ptr.dtype.element_ty
    q_rows = q_ptr + batch * stride_q_batch + (head * GROUP + offs_m)[:, None] * stride_q_head
    mask_q = mask_m[:, None] & mask_d
    if cos_ptr is not None:
        cos_row = cos_ptr + position.to(tl.int64) * stride_cos
        sin_row = sin_ptr + position.to(tl.int64) * stride_sin
        q = load_turned(q_rows, offs_d[None, :], mask_q, cos_row, sin_row, HEAD_DIM, INTERLEAVED)
        if q_scale_ptr is not None:
            q *= tl.load(q_scale_ptr + position)
        q = q.to(dtype)
    else:
        q = tl.load(q_rows + offs_d[None, :], mask=mask_q, other=0.0)

    # Scales multiply the scores and the sum, not each element.
    k_scale = 1.0
    v_scale = 1.0
    score_scale = scale
    value_scale = 1.0
    if CACHE_FORMAT is not None:
        k_scale = tl.load(k_scale_ptr + head * stride_k_scale)
        v_scale = tl.load(v_scale_ptr + head * stride_v_scale)
        unit: tl.constexpr = 256.0 if CACHE_FORMAT == "fp8" else 1.0
        score_scale = scale * k_scale * unit
        value_scale = v_scale * unit

    k_ring = k_cache_ptr + head * stride_k_cache_head
    v_ring = v_cache_ptr + head * stride_v_cache_head
    table_row = block_table_ptr + batch * stride_table_batch
    if PAGE_SIZE == 0:
        page = tl.load(table_row).to(tl.int64)
        k_ring += page * stride_k_page
        v_ring += page * stride_v_page
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    # The newest split: writes the new key and value, and starts the softmax with them.
    if split == live - 1:
        k_slot, v_slot, row = k_ring, v_ring, (position % capacity).to(tl.int64)
        if PAGE_SIZE:
            page, row = page_and_row(table_row, position % capacity, position >= 0, PAGE_SIZE)
            k_slot += page * stride_k_page
            v_slot += page * stride_v_page
        k_slot += row * stride_k_slot + offs_d[None, :]
        v_slot += row * stride_v_slot + offs_d[None, :]
        kept = mask_d & (page >= 0)  # a slot without a page keeps nothing
        if k_ptr is not None:
            k_row = k_ptr + batch * stride_k_batch + head * stride_k_head
            v_row = v_ptr + batch * stride_v_batch + head * stride_v_head
            if cos_ptr is not None:
                k_new = load_turned(
                    k_row, offs_d[None, :], mask_d, cos_row, sin_row, HEAD_DIM, INTERLEAVED
                ).to(dtype)
            else:
                k_new = tl.load(k_row + offs_d[None, :], mask=mask_d, other=0.0)
            v_new = tl.load(v_row + offs_d[None, :], mask=mask_d, other=0.0)
            if CACHE_FORMAT is not None:
                k_new = as_stored(k_new.to(tl.float32), k_scale, CACHE_FORMAT)
                v_new = as_stored(v_new.to(tl.float32), v_scale, CACHE_FORMAT)
            tl.store(k_slot, k_new, mask=kept)
            tl.store(v_slot, v_new, mask=kept)
        else:
            k_new = tl.load(k_slot, mask=kept, other=0)
            v_new = tl.load(v_slot, mask=kept, other=0)
        if first <= position:  # else `starts` hides it
            new_key = expanded(k_new, dtype, CACHE_FORMAT).to(tl.float32)
            top = tl.sum(q.to(tl.float32) * new_key, axis=1) * score_scale
            total = tl.exp2(top - tl.where(top == -float("inf"), 0.0, top))
            acc = total[:, None] * expanded(v_new, dtype, CACHE_FORMAT).to(tl.float32)

    # Old keys, all in masked tiles: every head of the group sees the same.
    keys = (
        k_ring, v_ring, stride_k_slot, stride_v_slot, stride_k_page, stride_v_page,
        table_row, capacity,
    )  # fmt: skip
    acc, top, total = attend_tiles(
        (acc, top, total), q, begin_tile * BLOCK_N, end_tile * BLOCK_N, first, position, None, None,
        score_scale, keys, True, None, True, PAGE_SIZE, CACHE_FORMAT, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    acc *= value_scale

    if live == 1:
        rows = pair * GROUP + offs_m
        store_outputs(out_ptr, lse_ptr, rows, mask_m, offs_d, acc, total, top, HEAD_DIM)
        return

    # Leave this split's partial; all but the last block are done.
    tops_ptr, totals_ptr, accs_ptr = partial_pointers(workspace_ptr + counter_bytes, GROUP)
    at = (pair * tl.num_programs(1) + split) * GROUP + offs_m
    tl.store(tops_ptr + at, top, mask=mask_m)
    tl.store(totals_ptr + at, total, mask=mask_m)
    tl.store(accs_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=mask_q)
    tl.debug_barrier()  # the one thread that counts must release what all have stored
    counter_ptr = workspace_ptr.to(tl.pointer_type(tl.int32)) + pair
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") != live - 1:
        return
    tl.store(counter_ptr, 0)  # for the next call

    offs_h = tl.arange(0, REDUCE_HEADS)
    acc, total, top = reduce_partials(
        tops_ptr, totals_ptr, accs_ptr, pair * tl.num_programs(1), live, offs_h, offs_d,
        HEAD_DIM, GROUP, REDUCE_HEADS, REDUCE_SPLITS, BLOCK_D,
    )  # fmt: skip
    rows = pair * GROUP + offs_h
    store_outputs(out_ptr, lse_ptr, rows, offs_h < GROUP, offs_d, acc, total, top, HEAD_DIM)


def tile_config(
    head_dim: int,
    group: int,
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    arch: tuple[int, int],
) -> dict[str, int]:
    """Tiles, warps and stages for keys of `head_dim` on compute capability `arch`; not measured.

    Tiles of 64 keys, 16 KB in bf16: eight 16-byte loads a thread; fewer keys where they are wider.
    16 in fp32, whose products are no tensor-core instructions and hold whole rows in registers.
    Stages fill half the shared memory of a processor, so that two blocks share it and one loads
    while the other reduces; where pages are looked up first, Triton spends two stages a buffer.
    Eight warps for a quantised cache, whose expanded tiles spill with four, and for many heads.
    What still spills, by 0.3 KB: float32 rows of 256 with a quantised cache.
    """
    block_d = max(triton.next_power_of_2(head_dim), 16)
    row_bytes = block_d * cache_dtype.itemsize
    block_n = 16 if dtype == torch.float32 else min(max(16384 // row_bytes, 16), 64)
    room = shared_bytes(arch) // 2 - 8192
    if dtype == torch.float32 and cache_dtype != dtype:
        room -= 2 * block_n * block_d * dtype.itemsize  # without mma expanded tiles lie there, too
    buffers = min(max(room // (2 * block_n * row_bytes), 1), 4)
    return {
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": 8 if cache_dtype in CACHE_FORMATS or group > 16 else 4,
        "num_stages": (2 * buffers if page_size else buffers) + 1,
    }


def _constants(group, page_size, interleaved, head_dim, dtype, cache_dtype, arch) -> dict:
    """The kernel's constexprs and options; page_size is 0 for one page a sequence."""
    config = tile_config(head_dim, group, page_size, dtype, cache_dtype, arch)
    heads = triton.next_power_of_2(group)
    return config | {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "INTERLEAVED": interleaved,
        "CACHE_FORMAT": CACHE_FORMATS.get(cache_dtype),
        "BLOCK_M": max(heads, 16),
        "REDUCE_HEADS": heads,
        # 64 floats a thread are in flight.
        "REDUCE_SPLITS": min(max(8192 // (heads * config["BLOCK_D"]), 1), MAX_SPLITS),
    }


def largest_workspace(pairs, group, head_dim, width, device, batch_invariant) -> int:
    """Bytes of workspace for every call of up to `pairs` = batch * kv_heads and `width` keys."""
    return enough_workspace(pairs, group, head_dim, width, block_slots(device, batch_invariant))


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    window: int | None,
    starts: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    workspace: torch.Tensor | None,
    batch_invariant: bool,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes `out`, `lse` and the ring; the arguments are those of the op.

    Raises:
        ValueError: workspace is too small or misaligned.
    """
    batch, q_heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    pages_per_seq = block_table.shape[1]
    capacity = pages_per_seq * page_size
    pairs, group = batch * kv_heads, q_heads // kv_heads
    if pairs == 0:
        return
    arch, _ = processor(q.device)
    one_page = 0 if pages_per_seq == 1 else page_size
    constants = _constants(group, one_page, interleaved, head_dim, q.dtype, k_cache.dtype, arch)
    width = capacity if window is None else min(window, capacity)
    cut = plan(pairs, width, constants["BLOCK_N"], block_slots(q.device, batch_invariant))
    workspace = workspace_for(q, workspace, pairs, cut, group, head_dim)
    k_cache, v_cache = as_codes(k_cache), as_codes(v_cache)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        decode_attention_kernel[(pairs, cut.splits)](
            q, k, v, out, lse, k_cache, v_cache, block_table, positions, starts, cos, sin, q_scale,
            k_scale, v_scale, workspace, kv_heads, capacity, width, scale * LOG2_E.value,
            cut.tiles_at_least, cut.most_splits,
            0 if workspace is None else counter_share(workspace.numel()),
            *q.stride()[:2],
            *((0, 0) if k is None else k.stride()[:2]),
            *((0, 0) if v is None else v.stride()[:2]),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            block_table.stride(0),
            0 if cos is None else cos.stride(0),
            0 if sin is None else sin.stride(0),
            int(k_scale is not None and k_scale.numel() > 1),
            int(v_scale is not None and v_scale.numel() > 1),
            **constants,
        )  # fmt: skip


def work(
    batch: int, keys: int, q_heads: int, kv_heads: int, head_dim: int, cache_bytes: int
) -> tuple[int, int]:
    """Bytes that a call with bf16 rows moves, keys and values above all, and its operations."""
    cache = 2 * batch * keys * kv_heads * head_dim * cache_bytes
    return cache + 4 * batch * (
        q_heads + kv_heads
    ) * head_dim, 4 * batch * keys * q_heads * head_dim


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mistral 7B's heads, 32 and 8 of 128."""
    names = decode_attention_kernel.arg_names
    fixed = {name: "i32" for name in names[names.index("kv_heads") : names.index("HEAD_DIM")]}
    fixed |= dict.fromkeys(("lse_ptr", "cos_ptr", "sin_ptr"), "*fp32") | {"scale": "fp32"}
    fixed |= dict.fromkeys(("block_table_ptr", "positions_ptr"), "*i32") | {"workspace_ptr": "*u8"}
    bf16, fp32, int8, fp8 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
    pointers = {bf16: "*bf16", fp32: "*fp32", int8: "*i8", fp8: "*u8"}
    cases = []
    for case, dtype, cache_dtype, page_size, head_dim, group, batches in (
        ("bf16 one page", bf16, bf16, 0, 128, 4, (1, 8, 32)),
        ("bf16 pages of 256", bf16, bf16, 256, 128, 4, ()),
        ("bf16 head 256", bf16, bf16, 256, 256, 4, ()),
        ("bf16 head 80", bf16, bf16, 16, 80, 4, ()),
        ("fp32 one page", fp32, fp32, 0, 128, 4, ()),
        ("bf16, int8 cache", bf16, int8, 0, 128, 4, (32,)),
        ("bf16, fp8 cache", bf16, fp8, 0, 128, 4, ()),
        ("fp32, fp8 cache", fp32, fp8, 16, 128, 4, None),
        ("bf16, largest group", bf16, bf16, 16, 128, MAX_GROUP, None),
        ("bf16 head 256, largest group", bf16, bf16, 16, 256, MAX_GROUP, None),
    ):
        signature = fixed | dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), pointers[dtype])
        signature |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), pointers[cache_dtype])
        if cache_dtype in CACHE_FORMATS:
            signature |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32")
        works = {n: work(n, 4096, 32, 8, 128, cache_dtype.itemsize) for n in batches or ()}
        interleaved = page_size != 256
        cases.append(
            {
                "case": case,
                "kernel": decode_attention_kernel,
                "signature": signature,
                "constexprs": _constants(
                    group, page_size, interleaved, head_dim, dtype, cache_dtype, arch
                ),
                "due": ("cp_async",) if dtype == fp32 else ("mma", "cp_async"),
                "work": {f"4096 keys, {case}, batch {n}": works[n] for n in works},
                "rare": batches is None,
            }
        )
    return cases
