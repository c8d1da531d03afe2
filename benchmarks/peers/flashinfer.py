"""FlashInfer; signatures of flashinfer 0.2 and later. Plans are made once and are not timed."""

import torch

from benchmarks.peers import packages

NAME = "flashinfer"
PLACES = tuple(
    f"flashinfer:{name}"
    for name in (
        *("single_prefill_with_kv_cache", "BatchDecodeWithPagedKVCacheWrapper"),
        *("append_paged_kv_cache", "apply_rope_with_cos_sin_cache_inplace"),
        *("rmsnorm", "fused_add_rmsnorm", "silu_and_mul"),
    )
)
WORKSPACE_BYTES = 128 << 20  # what its documentation asks for
LAYOUT = "HND"  # the benchmark's pages hold one head's keys after the other


def missing(device: str) -> str | None:
    return packages.missing("flashinfer", *PLACES, needs_cuda=True, device=device)


def prefill_attention(shape, dtype, device):
    if dtype == torch.float32:
        return "takes no float32"
    from flashinfer import single_prefill_with_kv_cache

    # window_left: keys before a query that it sees beside its own; -1: all.
    left = -1 if shape.window is None else shape.window - 1
    return lambda q, k, v: single_prefill_with_kv_cache(q, k, v, causal=True, window_left=left)


def decode_attention(shape, dtype, device):
    """Timed: the write of the new key and value, and attention over the ring in slot order."""
    if dtype == torch.float32:
        return "takes no float32"
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, append_paged_kv_cache

    batch, window = shape.batch, shape.window
    pages = torch.arange(batch + 1, dtype=torch.int32, device=device)  # one page a sequence
    filled = torch.full((batch,), window, dtype=torch.int32, device=device)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, LAYOUT)
    sizes = (shape.q_heads, shape.kv_heads, shape.head_dim, window)
    types = {"q_data_type": dtype, "kv_data_type": dtype}
    wrapper.plan(pages, pages[:batch], filled, *sizes, window_left=window - 1, **types)
    rows, slots = pages[:batch], filled - 1

    def run(q, k, v, k_cache, v_cache, workspace):
        caches = (k_cache.transpose(1, 2), v_cache.transpose(1, 2))
        where = (rows, slots, caches, rows, pages, filled)
        append_paged_kv_cache(k, v, *where, kv_layout=LAYOUT)
        return wrapper.run(q, caches)

    return run


def rms_norm(shape, dtype, device):
    from flashinfer import rmsnorm

    return lambda x, weight, eps: rmsnorm(x, weight, eps=eps)


def add_rms_norm(shape, dtype, device):
    from flashinfer import fused_add_rmsnorm

    def run(x, residual, weight, eps):
        """In place: the sum comes to `residual`, its norm to `x`."""
        fused_add_rmsnorm(x, residual, weight, eps=eps)
        return x

    return run


def rope_(shape, dtype, device):
    from flashinfer import apply_rope_with_cos_sin_cache_inplace

    def run(q, k, cos, sin, positions, forms):
        call = (positions, q.flatten(1), k.flatten(1), shape.head_dim, forms["joined"])
        apply_rope_with_cos_sin_cache_inplace(*call, is_neox=False)  # pairs, not halves
        return k

    return run


def silu_mul(shape, dtype, device):
    from flashinfer import silu_and_mul

    return silu_and_mul
