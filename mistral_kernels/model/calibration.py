"""Quantises the matrices of a layer, in the order in which texts pass them.

A matrix is quantised for the inputs that it will have: those that the texts give it behind all
that is quantised before it, layers and matrices of its own layer. Of a mixture of experts each
expert is fitted to the tokens that the router sends to it, weighted as the router weighs them, for
that is how its errors reach the output.

Shapes: T tokens of a chunk, packed; H hidden; F ffn_dim. Rows of wq and wk are in Hugging Face's
order, and tensors go by their Hugging Face names within the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mistral_kernels import ops
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.error_compensation import Inputs
from mistral_kernels.model.rope_tables import RopeTables, rope_tables
from mistral_kernels.model.step import PrefillRows, plan_step

CHUNK_TOKENS = 2048  # that pass a layer at once; no text is longer

# Quantises the weight of a name for these inputs, and returns it dequantised, float32.
Round = Callable[[str, Inputs], Tensor]


class TextActivations:
    """The activations of some texts, on their way through the layers of a model.

    Args:
        config: the model, in Hugging Face's order of rows.
        texts: token ids of each text, of at most CHUNK_TOKENS.
        embedding: (vocab, H), any dtype.
        device: where to compute.
    """

    def __init__(
        self,
        config: ModelConfig,
        texts: Sequence[Sequence[int]],
        embedding: Tensor,
        device: torch.device,
    ):
        self.config, self.device = config, device
        self.steps: list[PrefillRows] = []
        self.chunks: list[Tensor] = []  # (T, H) each, float32
        for chunk in _packed(texts):
            lengths = [len(text) for text in chunk]
            zeros = [0] * len(lengths)
            self.steps.append(plan_step(lengths, zeros, zeros, False, device).prefill)
            ids = torch.tensor([token for text in chunk for token in text])
            self.chunks.append(embedding[ids].float())
        self.tables: RopeTables = rope_tables(config, CHUNK_TOKENS, device, torch.float32)

    def pass_layer(self, layer: int, tensors: dict[str, Tensor], quantise: Round) -> None:
        """Takes all chunks through a layer, whose matrices are quantised on the way.

        Args:
            layer: its number.
            tensors: name within the layer -> norms and router; other names are `quantise`'s.
            quantise: called once for each other matrix.
        """
        get = {name: tensor.to(self.device, torch.float32) for name, tensor in tensors.items()}
        self._pass_attention(get["input_layernorm.weight"], self.config.windows[layer], quantise)
        norm = get["post_attention_layernorm.weight"]
        if self.config.experts:
            self._pass_experts(norm, get["block_sparse_moe.gate.weight"], quantise)
        else:
            self._pass_feed_forward(norm, quantise)

    def _pass_attention(self, norm: Tensor, window: int | None, quantise: Round) -> None:
        inputs = Inputs(lambda: self._normed(norm))
        qkv = torch.cat([quantise(f"self_attn.{x}_proj.weight", inputs) for x in "qkv"])
        attended = [
            self._attend(normed, qkv, step, window)
            for normed, step in zip(self._normed(norm), self.steps, strict=True)
        ]
        output = quantise("self_attn.o_proj.weight", Inputs(lambda: attended))
        for x, heads in zip(self.chunks, attended, strict=True):
            x += heads @ output.T

    def _pass_feed_forward(self, norm: Tensor, quantise: Round) -> None:
        inputs = Inputs(lambda: self._normed(norm))
        gate_up = torch.cat([quantise(f"mlp.{x}_proj.weight", inputs) for x in ("gate", "up")])

        def inner() -> Iterable[Tensor]:
            return (ops.silu_mul(x @ gate_up.T) for x in self._normed(norm))

        down = quantise("mlp.down_proj.weight", Inputs(inner))
        for x, h in zip(self.chunks, inner(), strict=True):
            x += h @ down.T

    def _normed(self, weight: Tensor) -> Iterable[Tensor]:
        return (ops.rms_norm(x, weight, self.config.norm_eps) for x in self.chunks)

    def _attend(self, normed: Tensor, qkv: Tensor, step: PrefillRows, window: int | None) -> Tensor:
        config, tables = self.config, self.tables
        heads = (config.q_heads, config.kv_heads, config.kv_heads)
        q, k, v = (normed @ qkv.T).unflatten(1, (-1, config.head_dim)).split(heads, 1)
        ops.rope_(
            q,
            k,
            tables.cos,
            tables.sin,
            step.positions,
            interleaved=config.interleaved,
            q_scale=tables.q_scale,
        )
        out, _ = ops.prefill_attention(q, k, v, step.cu_seqlens, window=window)
        return out.flatten(1)

    def _pass_experts(self, norm: Tensor, gate: Tensor, quantise: Round) -> None:
        normed = list(self._normed(norm))
        routed = [ops.route_experts(x @ gate.T, self.config.top_k) for x in normed]
        for expert in range(self.config.experts):
            shares = [(weights * (ids == expert)).sum(1, keepdim=True) for weights, ids in routed]
            self._pass_expert(expert, normed, shares, quantise)

    def _pass_expert(
        self, expert: int, normed: list[Tensor], shares: list[Tensor], quantise: Round
    ) -> None:
        name = f"block_sparse_moe.experts.{expert}.w{{}}.weight".format
        rows = [(share > 0).squeeze(1).nonzero().squeeze(1) for share in shares]
        given = [x[row] for x, row in zip(normed, rows, strict=True)]
        shares = [share[row] for share, row in zip(shares, rows, strict=True)]
        inputs = Inputs(lambda: (x * share for x, share in zip(given, shares, strict=True)))
        gate_up = torch.cat([quantise(name(part), inputs) for part in (1, 3)])
        inner = [
            ops.silu_mul(x @ gate_up.T) * share for x, share in zip(given, shares, strict=True)
        ]
        down = quantise(name(2), Inputs(lambda: inner))
        for x, row, h in zip(self.chunks, rows, inner, strict=True):
            x[row] += h @ down.T


def _packed(texts: Sequence[Sequence[int]]) -> Iterable[list[Sequence[int]]]:
    """Texts in their order, as many together as a chunk holds."""
    chunk, tokens = [], 0
    for text in texts:
        if chunk and tokens + len(text) > CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(text)
        tokens += len(text)
    if chunk:
        yield chunk
