"""The parts of a block: attention with its ring, and the feed-forward, dense or mixture of experts.

Shapes: T tokens of all sequences, packed; H hidden; Q, K q_heads and kv_heads; D head_dim;
F ffn_dim; E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mistral_kernels.model.cache import LayerCache
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.low_bit_weight import LowBitForm, LowBitWeight
from mistral_kernels.model.rope_tables import RopeTables
from mistral_kernels.model.step import ALL, DecodeRows, PrefillRows, Step
from mistral_kernels.ops.dispatch import BoundOp

# op -> the op on the backend that serves it; one dict, shared by a whole model. The model's own
# arguments fit, so a step does not check them op by op.
Kernels = dict[str, BoundOp]
# name of a weight of this layer -> its form, of those in few bits
Forms = Mapping[str, LowBitForm]

BATCH_INVARIANT = False
NOT_QUANTISED = (None, None)  # k_scale, v_scale


def parameter(*shape: int, **place) -> nn.Parameter:
    """An uninitialised weight; `place` is device and dtype, as in torch's own modules."""
    # Frozen: this is an inference model, and ops that write in place refuse autograd.
    return nn.Parameter(torch.empty(shape, **place), requires_grad=False)


def projection(form: LowBitForm | None, *shape: int, **place) -> nn.Parameter | LowBitWeight:
    """An uninitialised weight (..., out, in), in few bits where a form is given."""
    if form is None:
        return parameter(*shape, **place)
    return LowBitWeight(form, shape, place["device"])


def linear(kernels: Kernels, x: Tensor, weight: Tensor | LowBitWeight) -> Tensor:
    """x times a weight transposed, in full or in few bits."""
    if isinstance(weight, LowBitWeight):
        qweight, scales, zeros, perm = weight.tensors
        form = weight.form
        return kernels["linear_low_bit"](
            x, qweight, scales, zeros, form.bits, form.group_size, perm
        )
    return kernels["linear"](x, weight, BATCH_INVARIANT)


class Attention(nn.Module):
    """Grouped-query attention over one layer's window."""

    def __init__(
        self, config: ModelConfig, window: int | None, kernels: Kernels, forms: Forms, **place
    ):
        super().__init__()
        self.config, self.window, self.kernels = config, window, kernels
        self.heads = (config.q_heads, config.kv_heads, config.kv_heads)
        self.scale = config.head_dim**-0.5
        q_size = config.q_heads * config.head_dim
        rows = sum(self.heads) * config.head_dim
        self.wqkv = projection(forms.get("wqkv"), rows, config.hidden, **place)
        self.wo = projection(forms.get("wo"), config.hidden, q_size, **place)

    def forward(
        self, x: Tensor, step: Step, tables: RopeTables, layer_cache: LayerCache | None
    ) -> Tensor:
        qkv = linear(self.kernels, x, self.wqkv)  # (T, (Q + 2K) * D)
        qkv = qkv.view(len(x), sum(self.heads), self.config.head_dim)
        q, k, v = qkv.split(self.heads, 1)  # (T, Q, D), (T, K, D), (T, K, D)
        if step.prefill is None and step.decode.rows is ALL:
            out = self._decode(q, k, v, step.decode, tables, layer_cache)
        else:
            out = q.new_empty(q.shape)
            for part, attend in ((step.decode, self._decode), (step.prefill, self._prefill)):
                if part is not None:
                    rows = (x[part.rows] for x in (q, k, v))
                    out[part.rows] = attend(*rows, part, tables, layer_cache)
        return linear(self.kernels, out.flatten(1), self.wo)

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        part: DecodeRows,
        tables: RopeTables,
        layer_cache: LayerCache,
    ) -> Tensor:
        decode_attention = layer_cache.decode or self.kernels["decode_attention"]
        out, _ = decode_attention(
            q,
            k,
            v,
            layer_cache.k,
            layer_cache.v,
            layer_cache.block_table[part.sequences],
            part.positions,
            tables.cos,
            tables.sin,
            self.config.interleaved,
            self.window,
            part.starts,
            tables.q_scale,
            self.scale,
            *NOT_QUANTISED,
            layer_cache.workspace,
            BATCH_INVARIANT,
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
        self.kernels["rope_"](
            q,
            k,
            tables.cos,
            tables.sin,
            part.positions,
            self.config.interleaved,
            tables.q_scale,
        )
        ring = (None, None, None)
        context_lens = starts = None
        if layer_cache is not None:
            ring = (layer_cache.k, layer_cache.v, layer_cache.block_table[part.sequences])
            context_lens, starts = part.context_lens, part.starts
        out, _ = self.kernels["prefill_attention"](
            q,
            k,
            v,
            part.cu_seqlens,
            *ring,
            context_lens,
            starts,
            self.window,
            True,  # causal
            self.scale,
            *NOT_QUANTISED,
            BATCH_INVARIANT,
        )
        if layer_cache is not None:
            # After attending: these keys overwrite some that the chunk's early rows had to see.
            self.kernels["store_kv_"](k, v, *ring, part.cu_seqlens, context_lens, *NOT_QUANTISED)
        return out


class FeedForward(nn.Module):
    """w2 (silu(w1 x) * w3 x); w13 holds w1's rows, then w3's."""

    def __init__(self, config: ModelConfig, kernels: Kernels, forms: Forms, **place):
        super().__init__()
        self.kernels = kernels
        self.w13 = projection(forms.get("w13"), 2 * config.ffn_dim, config.hidden, **place)
        self.w2 = projection(forms.get("w2"), config.hidden, config.ffn_dim, **place)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        gate_up = linear(self.kernels, x, self.w13)  # (T, 2F)
        return linear(self.kernels, self.kernels["silu_mul"](gate_up), self.w2)


class MixtureOfExperts(nn.Module):
    """The router's top_k experts of each token, weighted and summed."""

    def __init__(self, config: ModelConfig, kernels: Kernels, forms: Forms, **place):
        super().__init__()
        self.kernels, self.top_k = kernels, config.top_k
        experts, hidden, ffn_dim = config.experts, config.hidden, config.ffn_dim
        self.gate = parameter(experts, hidden, **place)
        self.w13 = projection(forms.get("w13"), experts, 2 * ffn_dim, hidden, **place)
        self.w2 = projection(forms.get("w2"), experts, hidden, ffn_dim, **place)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        logits = linear(self.kernels, x, self.gate)  # (T, E)
        weights, expert_ids = self.kernels["route_experts"](logits, self.top_k, step.positions)
        if isinstance(self.w13, LowBitWeight):
            return self._low_bit(x, weights, expert_ids)
        return self.kernels["expert_mlp"](
            x, self.w13, self.w2, weights, expert_ids, BATCH_INVARIANT
        )

    def _low_bit(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        up, down = self.w13.tensors, self.w2.tensors
        whole_rows = self.w13.whole_rows and self.w2.whole_rows
        return self.kernels["expert_mlp_low_bit"](
            x,
            up.qweight,
            up.scales,
            down.qweight,
            down.scales,
            weights,
            expert_ids,
            up.zeros,
            down.zeros,
            self.w13.form.bits,
            None if whole_rows else self.w13.form.group_size,
            up.perm,
            down.perm,
        )


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self, config: ModelConfig, window: int | None, kernels: Kernels, forms: Forms, **place
    ):
        super().__init__()
        self.eps, self.kernels = config.norm_eps, kernels
        self.attention_norm = parameter(config.hidden, **place)
        self.attention = Attention(config, window, kernels, forms, **place)
        self.ffn_norm = parameter(config.hidden, **place)
        feed_forward = MixtureOfExperts if config.experts else FeedForward
        self.feed_forward = feed_forward(config, kernels, forms, **place)

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        step: Step,
        tables: RopeTables,
        layer_cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns x + added (T, H) as its two summands.

        The norm behind a sum does it in its own launch, here and at the end of the model; `added`
        is None in front of the first layer.
        """
        normed, x = residual_norm(self.kernels, x, added, self.attention_norm, self.eps)
        attended = self.attention(normed, step, tables, layer_cache)
        normed, x = residual_norm(self.kernels, x, attended, self.ffn_norm, self.eps)
        return x, self.feed_forward(normed, step)


def residual_norm(
    kernels: Kernels, x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of x + added, and that sum; `added` None: of x."""
    if added is None:
        return kernels["rms_norm"](x, weight, eps), x
    return kernels["add_rms_norm"](added, x, weight, eps)
