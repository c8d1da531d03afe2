"""Stand-ins for packages of kernels that need a GPU: real signatures, plain references.

Parameters and their meaning are those of the versions that the adapters name; a keyword that the
real function does not have fails here too. What this project never passes must have its default.
"""

import importlib.machinery
import sys
from types import ModuleType

import torch
import torch.nn.attention.varlen
from torch import Tensor


def plant(monkeypatch, **contents) -> None:
    """Put modules in sys.modules: "package__sub" -> {name: value}; parents come with them."""
    for place, names in contents.items():
        path = place.replace("__", ".")
        for end in [i for i, letter in enumerate(path) if letter == "."] + [len(path)]:
            if path[:end] not in sys.modules:
                module = ModuleType(path[:end])
                module.__spec__ = importlib.machinery.ModuleSpec(path[:end], None, is_package=True)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path[:end], module)
        vars(sys.modules[path]).update(names)


def attention(q: Tensor, k: Tensor, v: Tensor, left: int, causal: bool) -> Tensor:
    """(tokens, heads, head_dim); queries are the last of the keys; `left` keys before a query's own
    are seen, -1: all."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5
    behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    hidden = (behind < 0) & causal | (behind > left) & (left >= 0)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def plant_flash_attn(monkeypatch) -> None:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == len(q)
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, len(q)] and max_seqlen_k
        assert window_size[1] in (-1, 0)  # causal: nothing behind a query
        return attention(q, k, v, window_size[0], causal)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
        alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        out = torch.empty_like(q)
        for b, end in enumerate(cache_seqlens.tolist()):
            k_cache[b, end : end + k.shape[1]], v_cache[b, end : end + v.shape[1]] = k[b], v[b]
            cached = (cache[b, : end + k.shape[1]] for cache in (k_cache, v_cache))
            out[b] = attention(q[b], *cached, window_size[0], causal)
        return out

    def apply_rotary_emb(
        x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
        max_seqlen=None,
    ):  # fmt: skip
        assert x.dtype == cos.dtype == sin.dtype and interleaved and inplace
        rotate_pairs(x, cos[:, None], sin[:, None])
        return x

    functions = {
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
    }
    plant(monkeypatch, flash_attn=functions, flash_attn_interface=functions)
    plant(monkeypatch, flash_attn__layers__rotary={"apply_rotary_emb": apply_rotary_emb})


def plant_varlen_attn(monkeypatch) -> None:
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
    ):  # fmt: skip
        assert cu_seq_q.tolist() == cu_seq_k.tolist() == [0, len(query)] and enable_gqa
        assert max_q == max_k == len(query)
        return attention(query, key, value, window_size[0], causal=window_size[1] == 0)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Pairs (0, 1), (2, 3).. of the last dimension, in place."""
    a, b = x[..., ::2].float(), x[..., 1::2].float()
    x[..., ::2], x[..., 1::2] = a * cos - b * sin, b * cos + a * sin


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    scaled = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight.float()).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return (gate.float() * gate.float().sigmoid() * up.float()).to(gate.dtype)


def plant_flashinfer(monkeypatch) -> None:
    def single_prefill_with_kv_cache(
        q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
        packed_custom_mask=None, causal=False, kv_layout="NHD", pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, backend="auto", return_lse=False,
    ):  # fmt: skip
        return attention(q, k, v, window_left, causal)

    def append_paged_kv_cache(
        append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr,
        kv_last_page_len, kv_layout="NHD",
    ):  # fmt: skip
        assert kv_layout == "HND"
        for new, cache in zip((append_key, append_value), paged_kv_cache, strict=True):
            for row, position in zip(batch_indices.tolist(), positions.tolist(), strict=True):
                page = kv_indices[kv_indptr[row] + position // cache.shape[2]]
                cache[page, :, position % cache.shape[2]] = new[row]

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False):
            assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "HND"

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16",
            kv_data_type=None, data_type=None, sm_scale=None, rope_scale=None, rope_theta=None,
        ):  # fmt: skip
            self.sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
            self.pages = (indptr.tolist(), indices.tolist(), last_page_len.tolist())
            self.left, self.types = window_left, (q_data_type, kv_data_type)

        def run(self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None):
            (indptr, indices, lengths), caches = self.pages, paged_kv_cache
            q_heads, kv_heads, head_dim, page_size = self.sizes
            assert q.shape[1:] == (q_heads, head_dim) and self.types == (q.dtype, caches[0].dtype)
            assert caches[0].shape[1:] == (kv_heads, page_size, head_dim)
            out = torch.empty_like(q)
            for b, length in enumerate(lengths):
                (page,) = indices[indptr[b] : indptr[b + 1]]
                keys, values = (cache[page, :, :length].transpose(0, 1) for cache in caches)
                out[b] = attention(q[b : b + 1], keys, values, self.left, causal=False)[0]
            return out

    def apply_rope_with_cos_sin_cache_inplace(
        positions, query, key, head_size, cos_sin_cache, is_neox=True
    ):
        assert cos_sin_cache.dtype == torch.float32 and not is_neox
        cos, sin = cos_sin_cache[positions.long(), None].chunk(2, -1)
        for x in (query, key):
            rotate_pairs(x.view(len(x), -1, head_size), cos, sin)

    def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
        return norm(input, weight, eps)

    def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
        residual += input
        input.copy_(norm(residual, weight, eps))

    def silu_and_mul(input, out=None, enable_pdl=None):
        return gated(*input.chunk(2, -1))

    names = {name: value for name, value in locals().items() if name != "monkeypatch"}
    plant(monkeypatch, flashinfer=names)
