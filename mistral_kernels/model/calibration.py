"""Quantises the matrices of a layer, in the order in which texts pass them.

A matrix is quantised for the inputs that it will have: those that the texts give it behind all
that is quantised before it, layers and matrices of its own layer. Beside them go the activations of
the model as it was, which show what should come out. Of a mixture of experts each expert is fitted
to the tokens that the router sends to it, weighted as the router weighs them, for that is how its
errors reach the output.

Shapes: T tokens of a chunk, packed; H hidden; F ffn_dim. Rows of wq and wk are in Hugging Face's
order, and tensors go by their Hugging Face names within the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_kernels import ops
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.error_compensation import Inputs
from mistral_kernels.model.rope_tables import RopeTables, rope_tables
from mistral_kernels.model.step import PrefillRows, plan_step

CHUNK_TOKENS = 2048  # that pass a layer at once; no text is longer

# Two lists of activations, chunk by chunk: of the model as it becomes, and as it was.
Pair = tuple[list[Tensor], list[Tensor]]


class Matrices(NamedTuple):
    """The matrices of a layer, by their names within it; all float32."""

    full: Callable[[str], Tensor]  # as it was
    quantise: Callable[[str, Inputs], Tensor]  # made low-bit for these inputs, and widened again


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
        chunks = []
        for chunk in _packed(texts):
            lengths = [len(text) for text in chunk]
            zeros = [0] * len(lengths)
            self.steps.append(plan_step(lengths, zeros, zeros, False, device).prefill)
            ids = torch.tensor([token for text in chunk for token in text])
            chunks.append(embedding[ids].to(device, torch.float32))
        self.chunks: Pair = (chunks, [x.clone() for x in chunks])  # (T, H) each
        self.tables: RopeTables = rope_tables(config, CHUNK_TOKENS, device, torch.float32)

    def pass_layer(self, layer: int, plain: Mapping[str, Tensor], matrices: Matrices) -> None:
        """Takes all chunks through a layer, whose matrices are quantised on the way.

        Args:
            layer: its number.
            plain: name within the layer -> norms and router.
            matrices: the others.
        """
        get = {name: tensor.to(self.device, torch.float32) for name, tensor in plain.items()}
        norm = get["input_layernorm.weight"]
        self._pass_attention(self._normed(norm), self.config.windows[layer], matrices)
        normed = self._normed(get["post_attention_layernorm.weight"])
        if self.config.experts:
            self._pass_experts(normed, get["block_sparse_moe.gate.weight"], matrices)
        else:
            self._pass_feed_forward(normed, matrices)

    def _normed(self, weight: Tensor) -> Pair:
        return _both(lambda x: ops.rms_norm(x, weight, self.config.norm_eps), self.chunks)

    def _pass_attention(self, normed: Pair, window: int | None, matrices: Matrices) -> None:
        qkv = _joined([f"self_attn.{x}_proj.weight" for x in "qkv"], matrices, normed)
        attended = tuple(
            [self._attend(*each, weight, window) for each in zip(part, self.steps, strict=True)]
            for part, weight in zip(normed, qkv, strict=True)
        )
        self._add(attended, "self_attn.o_proj.weight", matrices)

    def _attend(self, normed: Tensor, step: PrefillRows, qkv: Tensor, window: int | None) -> Tensor:
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

    def _pass_feed_forward(self, normed: Pair, matrices: Matrices) -> None:
        weights = _joined([f"mlp.{x}_proj.weight" for x in ("gate", "up")], matrices, normed)
        inner = tuple(
            [ops.silu_mul(x @ weight.T) for x in part]
            for part, weight in zip(normed, weights, strict=True)
        )
        self._add(inner, "mlp.down_proj.weight", matrices)

    def _add(self, inputs: Pair, name: str, matrices: Matrices) -> None:
        """Adds what a matrix makes of its inputs to the residual stream."""
        weights = _joined([name], matrices, inputs, self._lost())
        for chunks, part, weight in zip(self.chunks, inputs, weights, strict=True):
            for x, h in zip(chunks, part, strict=True):
                x.addmm_(h, weight.T)

    def _lost(self) -> list[Tensor]:
        """What the residual stream has lost so far."""
        return [full - x for x, full in zip(*self.chunks, strict=True)]

    def _pass_experts(self, normed: Pair, gate: Tensor, matrices: Matrices) -> None:
        routed = _both(lambda x: ops.route_experts(x @ gate.T, self.config.top_k), normed)
        lost = self._lost()
        for expert in range(self.config.experts):
            shares = _both(lambda r, e=expert: (r[0] * (r[1] == e)).sum(1, keepdim=True), routed)
            self._pass_expert(f"block_sparse_moe.experts.{expert}.", normed, shares, lost, matrices)

    def _pass_expert(
        self, name: str, normed: Pair, shares: Pair, lost: list[Tensor], matrices: Matrices
    ) -> None:
        """One expert; `shares` are (T, 1), the weights that the router gives it."""
        rows = _both(lambda share: share.squeeze(1).nonzero().squeeze(1), shares)

        def chosen(part: int, by: int) -> list[Tensor]:
            return [x[row] for x, row in zip(normed[part], rows[by], strict=True)]

        own, before = (
            [share[row] for share, row in zip(*parts, strict=True)]
            for parts in zip(shares, rows, strict=True)
        )
        # Inputs as they were of the tokens that go to this expert now, wherever they went then.
        given = chosen(0, 0), chosen(1, 0)
        weigh = partial(zip, own, strict=True)
        weighted = tuple([x * share for share, x in weigh(part)] for part in given)
        up = _joined([f"{name}w{x}.weight" for x in (1, 3)], matrices, weighted)
        inner = tuple(
            [ops.silu_mul(x @ weight.T) * share for share, x in weigh(part)]
            for part, weight in zip(given, up, strict=True)
        )
        # A token's experts make up for what it has lost by their shares, which sum to 1.
        owed = [x[row] * share for share, x, row in weigh(lost, rows[0])]
        down, full = _joined([f"{name}w2.weight"], matrices, inner, owed)
        for x, row, h in zip(self.chunks[0], rows[0], inner[0], strict=True):
            x[row] += h @ down.T
        for x, row, h, share in zip(self.chunks[1], rows[1], chosen(1, 1), before, strict=True):
            x[row] += (ops.silu_mul(h @ up[1].T) * share) @ full.T


def _both(function: Callable[[Any], Any], pair: tuple[list[Any], list[Any]]) -> Pair:
    return [function(x) for x in pair[0]], [function(x) for x in pair[1]]


def _joined(
    names: list[str], matrices: Matrices, inputs: Pair, *lost: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Matrices that share their inputs, one below the other: quantised, and as they were."""
    given = Inputs(lambda: zip(*inputs, *lost, strict=True))
    quantised = [matrices.quantise(name, given) for name in names]
    return torch.cat(quantised), torch.cat([matrices.full(name) for name in names])


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
