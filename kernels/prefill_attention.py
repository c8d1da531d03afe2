"""prefill_attention in Triton: flash attention over ring pages and new keys, in position order.

A layer of Mistral 7B (32/8 heads of 128, window 4096, bf16) on 16384 new tokens: 58.7 M pairs of
query and key make 0.96 TFLOP; q, k, v and out are 0.34 GB. At peak rates an A100 takes 3.1 ms, an
H100 or H200 0.97 ms; the bytes take 0.17, 0.10 and 0.07 ms: bound by the tensor cores. Tiles of
32 tokens x 64 keys visit 1.6 % more than the pairs that count. 4 new tokens after 4096 cached ones
read 16.8 MB for 0.27 GFLOP: bound by memory, 8, 5 and 3.5 us, if enough programs share the keys.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from mistral_kernels.kernels.attention_combine import combine_splits
from mistral_kernels.kernels.attention_tiles import (
    NO_WINDOW,
    SHARED_KB,
    attend_source,
    find_sequence,
)
from mistral_kernels.kernels.key_splits import store_outputs

MAX_HEAD_DIM = 256  # a query tile and its sums live in registers
MAX_GROUP = 64  # the heads of one token fit into a tile, also in 99 KiB
SPLIT_KEYS = 256  # of a split at least: 0.13 MB at head_dim 128, 16 times its partial; not measured
MAX_SPLITS = 64  # a program of the combine reads them one after another
LOG2_E = math.log2(math.e)
CACHE_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


SIZES = "tokens", "batch", "tiles", "splits", "most_splits", "kv_heads", "window", "capacity"


@triton.jit(do_not_specialize=SIZES)
def prefill_attention_kernel(
    q_ptr,  # (tokens, q_heads, head_dim)
    k_ptr,  # (tokens, kv_heads, head_dim); None: all keys are in the cache
    v_ptr,
    out_ptr,  # (splits, tokens, q_heads, head_dim), contiguous
    lse_ptr,  # (splits, tokens, q_heads), fp32, contiguous
    cu_seqlens_ptr,  # (batch + 1,), i32
    context_lens_ptr,  # (batch,), i32; None without a ring, as the next five
    block_table_ptr,  # (batch, pages_per_seq), i32
    k_cache_ptr,  # (pages, page_size, kv_heads, head_dim)
    v_cache_ptr,
    k_scale_ptr,  # (1,) or (kv_heads,), fp32; None unless the cache is quantised
    v_scale_ptr,
    starts_ptr,  # (batch,), i32, or None
    tokens,  # of all sequences
    batch,
    tiles,  # query tiles: tokens // BLOCK_TOKENS + batch
    splits,  # of the grid: programs that share the keys of a query tile
    most_splits,  # that its keys are cut into, perhaps more than `splits`
    kv_heads,
    window,  # keys a query sees
    capacity,  # slots of a ring
    scale,  # fp32: of the scores, times log2(e)
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_k_page,
    stride_k_row,
    stride_k_cache_head,
    stride_v_page,
    stride_v_row,
    stride_v_cache_head,
    stride_table,
    stride_k_scale,  # 0 for one scale
    stride_v_scale,
    CAUSAL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: a sequence's ring is one page
    CACHE_FORMAT: tl.constexpr,  # "int8", "fp8", or None for q's dtype
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows: GROUP heads of BLOCK_M // GROUP tokens
    BLOCK_N: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,  # power of two, at least HEAD_DIM
    EDGE_STAGES: tl.constexpr,  # of loops with masks; None: num_stages
    SPLIT_KEYS: tl.constexpr,  # keys of a split at least, a multiple of BLOCK_N; 0: not split
):
    """Grid (tiles * splits * kv_heads,). A program owns one query tile of one kv head, or of it one
    split of its keys.

    Late tiles, which see most keys, run first, so that short ones fill the tail.
    """
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // GROUP
    pid = tl.program_id(0)
    kv_head, split = pid % kv_heads, pid // kv_heads % splits
    tile = tiles - 1 - pid // kv_heads // splits
    sequence, number = find_sequence(tile, cu_seqlens_ptr, batch, BLOCK_TOKENS)
    begin = tl.load(cu_seqlens_ptr + sequence)
    seqlen = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    if number * BLOCK_TOKENS >= seqlen:
        return

    # Queries: a row is one head of one token.
    row = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    token = number * BLOCK_TOKENS + row // GROUP
    mask_m = (row < BLOCK_TOKENS * GROUP) & (token < seqlen)
    head = kv_head.to(tl.int64) * GROUP + row % GROUP
    q_row = (begin + token).to(tl.int64) * stride_q_token + head * stride_q_head
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_row[:, None] + offs_d[None, :], mask=mask_q, other=0.0)

    # Positions. Row i sees from low[i] to high[i], the tile from live to before stop.
    context = 0
    if context_lens_ptr is not None:
        context = tl.load(context_lens_ptr + sequence)
    total = context + seqlen
    oldest = 0
    if context_lens_ptr is not None:
        oldest = tl.maximum(oldest, (total if k_ptr is None else context) - capacity)
    if starts_ptr is not None:
        oldest = tl.maximum(oldest, tl.load(starts_ptr + sequence))
    first_query = context + number * BLOCK_TOKENS
    last_query = tl.minimum(first_query + BLOCK_TOKENS, total) - 1
    low = tl.maximum(oldest, context + token - window + 1)
    live = tl.maximum(oldest, first_query - window + 1)
    full_low = tl.maximum(oldest, last_query - window + 1)
    if CAUSAL:
        high, stop, full_stop = context + token, last_query + 1, first_query + 1
    else:
        high, stop, full_stop = total - 1 + 0 * token, total, total
    if SPLIT_KEYS:
        # Cut in runs of whole tiles from the window's first on: the ring's capacity has no say.
        border = live // BLOCK_N * BLOCK_N
        share = tl.cdiv(tl.cdiv(stop - border, most_splits), BLOCK_N) * BLOCK_N
        share = tl.maximum(share, SPLIT_KEYS)
        border += split * share
        live, stop = tl.maximum(live, border), tl.minimum(stop, border + share)
        if live >= stop:  # no keys, which the lse tells
            out_row = (split.to(tl.int64) * tokens + begin + token) * (kv_heads * GROUP) + head
            tl.store(lse_ptr + out_row, float("-inf") + 0.0 * row, mask=mask_m)
            return

    # Keys: the ring's, then the new ones.
    state = (
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    if context_lens_ptr is not None:
        table_ptr = block_table_ptr + tl.cast(sequence, tl.int64) * stride_table
        k_ring = k_cache_ptr + kv_head.to(tl.int64) * stride_k_cache_head
        v_ring = v_cache_ptr + kv_head.to(tl.int64) * stride_v_cache_head
        if PAGE_SIZE == 0:
            page = tl.load(table_ptr).to(tl.int64)
            k_ring += page * stride_k_page
            v_ring += page * stride_v_page
        k_factor, v_factor = scale, 1.0
        if CACHE_FORMAT is not None:
            k_factor *= tl.load(k_scale_ptr + kv_head * stride_k_scale)
            v_factor *= tl.load(v_scale_ptr + kv_head * stride_v_scale)
        if CACHE_FORMAT == "fp8":  # what `expanded` leaves out
            k_factor, v_factor = k_factor * 256, v_factor * 256
        ring_stop = stop if k_ptr is None else tl.minimum(stop, context)
        keys = (
            k_ring, v_ring, stride_k_row, stride_v_row, stride_k_page, stride_v_page,
            table_ptr, capacity,
        )  # fmt: skip
        state = attend_source(
            state, q, live, ring_stop, low, high, full_low, full_stop, k_factor, keys,
            EDGE_STAGES, True, PAGE_SIZE, CACHE_FORMAT, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
        if CACHE_FORMAT is not None:
            state = (state[0] * v_factor, state[1], state[2])
    if k_ptr is not None:
        base = (begin - context).to(tl.int64)  # the row of position 0, were it a new key
        k_new = k_ptr + base * stride_k_token + kv_head.to(tl.int64) * stride_k_head
        v_new = v_ptr + base * stride_v_token + kv_head.to(tl.int64) * stride_v_head
        keys = (k_new, v_new, stride_k_token, stride_v_token, 0, 0, cu_seqlens_ptr, 1)
        state = attend_source(
            state, q, tl.maximum(live, context), stop, low, high, full_low, full_stop, scale, keys,
            EDGE_STAGES, False, 0, None, HEAD_DIM, BLOCK_N,
        )  # fmt: skip

    # Outputs, whose rows would not have fitted into registers beside the loops.
    acc, row_max, row_sum = state
    out_row = (split.to(tl.int64) * tokens + begin + token) * (kv_heads * GROUP) + head
    store_outputs(out_ptr, lse_ptr, out_row, mask_m, offs_d, acc, row_sum, row_max, HEAD_DIM)


def tile_config(
    head_dim: int,
    group: int,
    rows: int,
    dtype: torch.dtype,
    arch: tuple[int, int],
    *,
    quantised: bool = False,
) -> dict[str, int]:
    """Tiles, warps and stages where a sequence has `rows` rows (tokens * group). Not measured.

    128 rows by 8 warps: 64 registers a thread hold the sums of head_dim 128. 128 keys on sm_90 and
    64 below would spill; so would 128 rows of wider heads, on sm_120, and below sm_90 of cached
    codes, which each warp expands for itself. Masked tiles wait for their keys, which costs fewer
    registers than to prefetch them; but on sm_90 ptxas then puts a wait behind every wgmma of the
    kernel (its note C7515), as it does with three stages, but not with two. Few rows get a tile of
    their size: memory is what they wait for. float32 has no tensor cores: each product is an
    instruction of its own, by the thousand in larger tiles, which spill and compile for minutes.
    """
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_m = min(max(triton.next_power_of_2(rows), 16), 128)
    wgmma = arch[0] in (9, 10)
    block_n, stages = 64 if wgmma or block_m == 16 else 32, 3
    if dtype == torch.float32:
        block_m, block_n, stages = 16, 16, 1
    elif block_d > 128:
        block_m, block_n = min(block_m, 64), 32
    elif quantised and not wgmma or arch[0] == 12:
        block_m, block_n = min(block_m, 64), 64
    block_m = max(block_m, triton.next_power_of_2(group))
    limit = SHARED_KB.get(arch, 99) * 1024
    row_bytes = block_d * dtype.itemsize
    while (block_m + 2 * stages * block_n) * row_bytes > limit:
        if stages > 1:
            stages -= 1
        elif block_n > 16:
            block_n //= 2
        else:
            block_m //= 2
    few_sums = block_m * block_d <= (32 if arch[0] == 12 else 64) * 128
    small = few_sums and dtype != torch.float32 and not quantised and (wgmma or block_m <= 64)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "EDGE_STAGES": min(stages, 2) if wgmma else 1,
        "num_warps": 4 if small else 8,
        "num_stages": stages,
    }


def work(
    tokens: int, context: int, window: int, q_heads: int, kv_heads: int, head_dim: int
) -> tuple[int, int]:
    """Bytes that a call in bf16 moves, and operations on pairs of query and key that count."""
    pairs = sum(min(context + token + 1, window) for token in range(tokens))
    rows = 2 * tokens * q_heads + 2 * (tokens + min(context, window)) * kv_heads
    return 2 * rows * head_dim, 4 * pairs * q_heads * head_dim


@functools.cache
def _device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; the interpreter, on CPU tensors, is like one."""
    if device.type != "cuda":
        return (8, 0), 1
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    block_table: torch.Tensor | None,
    context_lens: torch.Tensor | None,
    starts: torch.Tensor | None,
    window: int | None,
    causal: bool,
    scale: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    batch_invariant: bool,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes `out` and `lse`; the arguments are those of the op (ops/prefill_attention.py).

    The keys of few queries are split among programs where there is a cache; how, depends on tokens,
    batch, heads and the window, never on the ring's capacity.
    """
    tokens, q_heads, head_dim = q.shape
    batch, kv_heads = len(cu_seqlens) - 1, (k_cache if k is None else k).shape[-2]
    if out.numel() == 0:
        return
    group = q_heads // kv_heads
    arch, multiprocessors = _device_facts(q.device)
    rows = 128 if batch_invariant else triton.cdiv(tokens, batch) * group
    config = tile_config(head_dim, group, rows, q.dtype, arch, quantised=k_scale is not None)
    block_tokens = config["BLOCK_M"] // group
    tiles = tokens // block_tokens + batch
    window = NO_WINDOW if window is None else min(window, NO_WINDOW)

    capacity = page_size = 0
    splits, most_splits, cache_format, sums = 1, 1, None, (out, lse)
    if k_cache is not None:
        capacity = block_table.shape[1] * k_cache.shape[1]
        page_size = 0 if block_table.shape[1] == 1 else k_cache.shape[1]
        cache_format = CACHE_FORMATS.get(k_cache.dtype)
        if cache_format == "fp8":
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
        splits, most_splits = _splits(
            window + block_tokens - 1,
            capacity + tokens,
            max(batch, triton.cdiv(tokens, block_tokens)) * kv_heads,
            1 if batch_invariant else multiprocessors,
        )
        if splits > 1:
            sums = tuple(x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (out, lse))

    with torch.cuda.device_of(q):  # Triton launches on the current device
        prefill_attention_kernel[(tiles * splits * kv_heads,)](
            q, k, v, *sums, cu_seqlens, context_lens, block_table, k_cache, v_cache, k_scale,
            v_scale, starts, tokens, batch, tiles, splits, most_splits, kv_heads, window, capacity,
            scale * LOG2_E,
            *_strides(q, 2), *_strides(k, 2), *_strides(v, 2),
            *_strides(k_cache, 3), *_strides(v_cache, 3), *_strides(block_table, 1),
            *(int(x is not None and x.numel() > 1) for x in (k_scale, v_scale)),
            CAUSAL=causal, PAGE_SIZE=page_size, CACHE_FORMAT=cache_format, GROUP=group,
            HEAD_DIM=head_dim, SPLIT_KEYS=SPLIT_KEYS if splits > 1 else 0, **config,
        )  # fmt: skip
        if splits > 1:
            combine_splits(*sums, out, lse)


def _splits(seen: int, held: int, busy: int, multiprocessors: int) -> tuple[int, int]:
    """Splits of the grid, and how many a query tile's keys are cut into, by what the host knows.

    Args:
        seen: keys that a window lets a tile see.
        held: keys that there can be: they bound the grid and decide nothing else.
        busy: programs that have queries, at least, if keys are not split.
    """
    most = min(multiprocessors // busy, MAX_SPLITS)
    if most < 2 or seen <= SPLIT_KEYS:
        return 1, 1
    # A window need not begin at a tile's first key; tiles are no longer than SPLIT_KEYS.
    return min(most, triton.cdiv(min(seen, held), SPLIT_KEYS) + 1), most


def _strides(x: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def codegen_cases(arch: tuple[int, int]) -> list[dict]:
    """What benchmarks/codegen.py compiles for `arch`: Mistral 7B's heads, and wider ones."""
    cases = []
    for case, head_dim, rows, cache, page_size in (
        ("new keys", 128, 128, None, 0),
        ("one page", 128, 128, "*bf16", 0),
        ("fp8 pages of 16", 128, 128, "*u8", 16),
        ("few rows, split", 128, 16, "*bf16", 0),
        ("new keys of 256", 256, 128, None, 0),
    ):
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16") | {"scale": "fp32"}
        signature["out_ptr"] = "*fp32" if rows == 16 else "*bf16"
        signature |= {"lse_ptr": "*fp32", "cu_seqlens_ptr": "*i32"}
        if cache is not None:
            signature |= dict.fromkeys(("context_lens_ptr", "block_table_ptr"), "*i32")
            signature |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), cache)
        if cache == "*u8":
            signature |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32")
        names = prefill_attention_kernel.arg_names
        sizes = names[names.index("tokens") : names.index("CAUSAL")]
        signature |= {name: "i32" for name in sizes if name != "scale"}
        config = tile_config(head_dim, 4, rows, torch.bfloat16, arch, quantised=cache == "*u8")
        constants = {
            "CAUSAL": True,
            "PAGE_SIZE": page_size,
            "CACHE_FORMAT": "fp8" if cache == "*u8" else None,
            "GROUP": 4,
            "HEAD_DIM": head_dim,
            "SPLIT_KEYS": SPLIT_KEYS if rows == 16 else 0,
        }
        works = {}
        if case == "new keys":
            works["16384 tokens, window 4096"] = work(16384, 0, 4096, 32, 8, 128)
        elif rows == 16:
            works["4 tokens after 4096"] = work(4, 4096, 4096, 32, 8, 128)
        cases.append(
            {
                "case": f"bf16 {case}",
                "kernel": prefill_attention_kernel,
                "signature": signature,
                "constexprs": constants | config,
                "due": ("wgmma" if config["BLOCK_M"] >= 64 else "mma", "cp_async"),
                "work": works,
            }
        )
    return cases
