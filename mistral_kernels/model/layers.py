"""The parts of a block: attention with its ring, and the feed-forward, dense or mixture of experts.

Shapes: T tokens of all sequences, packed; H hidden; Q, K q_heads and kv_heads; D head_dim;
F ffn_dim; E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mistral_kernels import ops
from mistral_kernels.model.cache import LayerCache
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.rope_tables import RopeTables
from mistral_kernels.model.step import DecodeRows, PrefillRows, Step

Backends = dict[str, str]  # op -> the backend that serves it; one dict shared by a whole model


def parameter(*shape: int, **place) -> nn.Parameter:
    """An uninitialised weight; `place` is device and dtype, as in torch's own modules."""
    # Frozen: this is an inference model, and ops that write in place refuse autograd.
    return nn.Parameter(torch.empty(shape, **place), requires_grad=False)


class Attention(nn.Module):
    """Grouped-query attention over one layer's window."""

    def __init__(self, config: ModelConfig, window: int | None, backends: Backends, **place):
        super().__init__()
        self.config, self.window, self.backends = config, window, backends
        self.heads = (config.q_heads, config.kv_heads, config.kv_heads)
        q_size = config.q_heads * config.head_dim
        self.wqkv = parameter(sum(self.heads) * config.head_dim, config.hidden, **place)
        self.wo = parameter(config.hidden, q_size, **place)

    def forward(
        self, x: Tensor, step: Step, tables: RopeTables, layer_cache: LayerCache | None
    ) -> Tensor:
        linear = self.backends["linear"]
        qkv = ops.linear(x, self.wqkv, backend=linear)  # (T, (Q + 2K) * D)
        qkv = qkv.view(len(x), sum(self.heads), self.config.head_dim)
        q, k, v = qkv.split(self.heads, 1)  # (T, Q, D), (T, K, D), (T, K, D)
        parts = [
            (part.rows, attend(q[part.rows], k[part.rows], v[part.rows], part, tables, layer_cache))
            for part, attend in ((step.decode, self._decode), (step.prefill, self._prefill))
            if part is not None
        ]
        if len(parts) == 1:
            out = parts[0][1]
        else:
            out = q.new_empty(q.shape)
            for rows, rows_out in parts:
                out[rows] = rows_out
        return ops.linear(out.flatten(1), self.wo, backend=linear)

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        part: DecodeRows,
        tables: RopeTables,
        layer_cache: LayerCache,
    ) -> Tensor:
        out, _ = ops.decode_attention(
            q,
            k,
            v,
            layer_cache.k,
            layer_cache.v,
            layer_cache.block_table[part.sequences],
            part.positions,
            tables.cos,
            tables.sin,
            interleaved=self.config.interleaved,
            window=self.window,
            starts=part.starts,
            q_scale=tables.q_scale,
            backend=self.backends["decode_attention"],
        )
        return out

    def _prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        part: PrefillRows,
        tables: RopeTables,
        layer_cache: LayerCache | None,
    ) -> Tensor:
        ops.rope_(
            q,
            k,
            tables.cos,
            tables.sin,
            part.positions,
            interleaved=self.config.interleaved,
            q_scale=tables.q_scale,
            backend=self.backends["rope_"],
        )
        attention = self.backends["prefill_attention"]
        if layer_cache is None:
            return ops.prefill_attention(
                q, k, v, part.cu_seqlens, window=self.window, backend=attention
            )[0]
        ring = (layer_cache.k, layer_cache.v, layer_cache.block_table[part.sequences])
        out, _ = ops.prefill_attention(
            q,
            k,
            v,
            part.cu_seqlens,
            k_cache=ring[0],
            v_cache=ring[1],
            block_table=ring[2],
            context_lens=part.context_lens,
            starts=part.starts,
            window=self.window,
            backend=attention,
        )
        # After attending: these keys overwrite some that the chunk's early rows had to see.
        ops.store_kv_(
            k, v, *ring, part.cu_seqlens, part.context_lens, backend=self.backends["store_kv_"]
        )
        return out


class FeedForward(nn.Module):
    """w2 (silu(w1 x) * w3 x); w13 holds w1's rows, then w3's."""

    def __init__(self, config: ModelConfig, backends: Backends, **place):
        super().__init__()
        self.backends = backends
        self.w13 = parameter(2 * config.ffn_dim, config.hidden, **place)
        self.w2 = parameter(config.hidden, config.ffn_dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        linear = self.backends["linear"]
        gate_up = ops.linear(x, self.w13, backend=linear)  # (T, 2F)
        return ops.linear(
            ops.silu_mul(gate_up, backend=self.backends["silu_mul"]), self.w2, backend=linear
        )


class MixtureOfExperts(nn.Module):
    """The router's top_k experts of each token, weighted and summed."""

    def __init__(self, config: ModelConfig, backends: Backends, **place):
        super().__init__()
        self.backends, self.top_k = backends, config.top_k
        self.gate = parameter(config.experts, config.hidden, **place)
        self.w13 = parameter(config.experts, 2 * config.ffn_dim, config.hidden, **place)
        self.w2 = parameter(config.experts, config.hidden, config.ffn_dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        logits = ops.linear(x, self.gate, backend=self.backends["linear"])  # (T, E)
        weights, expert_ids = ops.route_experts(
            logits, self.top_k, backend=self.backends["route_experts"]
        )
        return ops.expert_mlp(
            x, self.w13, self.w2, weights, expert_ids, backend=self.backends["expert_mlp"]
        )


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, window: int | None, backends: Backends, **place):
        super().__init__()
        self.eps, self.backends = config.norm_eps, backends
        self.attention_norm = parameter(config.hidden, **place)
        self.attention = Attention(config, window, backends, **place)
        self.ffn_norm = parameter(config.hidden, **place)
        feed_forward = MixtureOfExperts if config.experts else FeedForward
        self.feed_forward = feed_forward(config, backends, **place)

    def forward(
        self, x: Tensor, step: Step, tables: RopeTables, layer_cache: LayerCache | None = None
    ) -> Tensor:
        """x (T, H) -> (T, H)."""
        normed = ops.rms_norm(x, self.attention_norm, self.eps, backend=self.backends["rms_norm"])
        attended = self.attention(normed, step, tables, layer_cache)
        normed, x = ops.add_rms_norm(
            attended, x, self.ffn_norm, self.eps, backend=self.backends["add_rms_norm"]
        )
        return x + self.feed_forward(normed)
