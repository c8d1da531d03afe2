"""The model's parameters, and the checkpoint keys that fill them.

The model keeps fewer, larger parameters than the files: wq, wk and wv are rows of one matrix, w1
(gate) and w3 (up) of another, and the experts of a layer are stacked.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.ops.low_bit import LowBit

# Native keys become Hugging Face ones by these replacements, in this order.
HUGGINGFACE_NAMES = {
    r"^tok_embeddings": "model.embed_tokens",
    r"^norm": "model.norm",
    r"^output": "lm_head",
    r"^layers": "model.layers",
    r"attention_norm": "input_layernorm",
    r"ffn_norm": "post_attention_layernorm",
    r"attention\.w([qkvo])": r"self_attn.\1_proj",
    r"feed_forward\.w1\.": "mlp.gate_proj.",
    r"feed_forward\.w2\.": "mlp.down_proj.",
    r"feed_forward\.w3\.": "mlp.up_proj.",
    r"feed_forward\.(gate|experts)": r"block_sparse_moe.\1",
}

# transformers 5 holds the experts of a layer stacked; published checkpoints hold them one by one.
STACKED_EXPERTS = {
    "block_sparse_moe.gate": "mlp.gate",
    "feed_forward.w13.weight": "mlp.experts.gate_up_proj",
    "mlp.down_proj.weight": "mlp.experts.down_proj",
}


class Place(NamedTuple):
    """Where a checkpoint's tensor belongs: `parameters[parameter][index]`, of this shape.

    With `transposed` the last two dimensions of that part are swapped, as the tensor has them.
    """

    parameter: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    transposed: bool = False

    def of(self, parameters: Mapping[str, Tensor | LowBit]) -> Tensor | LowBit:
        """The part of the parameters, a view whose elements are in the tensor's order."""
        whole = parameters[self.parameter]
        if isinstance(whole, LowBit):
            return whole.part(*self.index)
        part = whole[self.index]
        return part.transpose(-1, -2) if self.transposed else part


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The model's parameters.

    Args:
        config: the model.

    Returns:
        Name and shape of every parameter, in the order of the model.
    """
    hidden, ffn_dim = config.hidden, config.ffn_dim
    experts = (config.experts,) if config.experts else ()
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab, hidden)}
    for n in range(config.layers):
        layer = f"layers.{n}"
        shapes[f"{layer}.attention_norm"] = (hidden,)
        heads = config.q_heads + 2 * config.kv_heads
        shapes[f"{layer}.attention.wqkv"] = (heads * config.head_dim, hidden)
        shapes[f"{layer}.attention.wo"] = (hidden, config.q_heads * config.head_dim)
        shapes[f"{layer}.ffn_norm"] = (hidden,)
        if experts:
            shapes[f"{layer}.feed_forward.gate"] = (*experts, hidden)
        shapes[f"{layer}.feed_forward.w13"] = (*experts, 2 * ffn_dim, hidden)
        shapes[f"{layer}.feed_forward.w2"] = (*experts, hidden, ffn_dim)
    shapes["norm"] = (hidden,)
    if not config.tied_embeddings:
        shapes["output"] = (config.vocab, hidden)
    return shapes


def checkpoint_table(config: ModelConfig, *, stacked: bool = False) -> dict[str, Place]:
    """The tensors of a native checkpoint, and the place of each.

    Args:
        config: the model.
        stacked: one key for all experts of a layer, `feed_forward.w13` and `feed_forward.w2`, as
            the parameters are; no native file is like that, but Hugging Face ones can be.

    Returns:
        Key to place; the places cover every parameter exactly once.
    """
    q_rows, kv_rows = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    ffn_dim = config.ffn_dim
    parts = {
        "wqkv": {"wq": q_rows, "wk": kv_rows, "wv": kv_rows},
        "w13": {"w1": ffn_dim, "w3": ffn_dim},
    }
    table: dict[str, Place] = {}
    for name, shape in parameter_shapes(config).items():
        owner, _, leaf = name.rpartition(".")
        of_experts = bool(config.experts) and leaf in ("w13", "w2")
        if of_experts and stacked:
            table[f"{name}.weight"] = Place(name, (), shape)
            continue
        rows, *columns = shape[1:] if of_experts else shape
        for expert in range(config.experts if of_experts else 1):
            prefix = f"{owner}.experts.{expert}" if of_experts else owner
            start = 0
            for part, size in parts.get(leaf, {leaf: rows}).items():
                index = slice(start, start + size)
                key = f"{prefix}.{part}.weight".removeprefix(".")
                place = (expert, index) if of_experts else (index,)
                table[key] = Place(name, place, (size, *columns))
                start += size
    return table


def huggingface_table(config: ModelConfig, *, stacked: bool) -> dict[str, Place]:
    """The same for a Hugging Face checkpoint; `stacked` tells its naming of the experts."""
    table = {}
    for key, place in checkpoint_table(config, stacked=stacked).items():
        for pattern, replacement in HUGGINGFACE_NAMES.items():
            key = re.sub(pattern, replacement, key)
        for native, name in STACKED_EXPERTS.items() if stacked else ():
            key = key.replace(native, name)
        table[key] = place
    return table


def first_mixtral_table(config: ModelConfig) -> dict[str, Place]:
    """The same for the first release of Mixtral, which stacks the experts of a layer.

    The rows of all experts follow each other, `(experts * ffn_dim, hidden)`, of w2 too: it is
    stored transposed. Source: transformers' convert_mixtral_weights_to_hf.py and mlx-examples'
    llms/mixtral/convert.py, which both read the published `consolidated.NN.pt`; the files
    themselves were not at hand.
    """
    table = {
        key.replace("feed_forward.gate", "block_sparse_moe.gate"): place
        for key, place in checkpoint_table(config).items()
        if ".experts." not in key
    }
    ffn_dim = config.ffn_dim
    shape = (config.experts * ffn_dim, config.hidden)
    gate, up = slice(0, ffn_dim), slice(ffn_dim, 2 * ffn_dim)
    for n in range(config.layers):
        w13, w2 = f"layers.{n}.feed_forward.w13", f"layers.{n}.feed_forward.w2"
        table[f"layers.{n}.block_sparse_moe.w1"] = Place(w13, (slice(None), gate), shape)
        table[f"layers.{n}.block_sparse_moe.w2"] = Place(w2, (), shape, transposed=True)
        table[f"layers.{n}.block_sparse_moe.w3"] = Place(w13, (slice(None), up), shape)
    return table


def half_split_rows(rows: Tensor, heads: int) -> Tensor:
    """Reorders the rows of wq or wk from native to Hugging Face order.

    Native rope turns neighbouring rows of a head, Hugging Face's turns row i with row
    i + head_dim/2: a head's rows 0 1 2 3 4 5 become 0 2 4 1 3 5.

    Args:
        rows: (heads * head_dim, columns) any dtype.
        heads: number of heads.

    Returns:
        The rows in their new order, same shape and dtype.
    """
    pairs = rows.view(heads, -1, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)


def interleaved_rows(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split_rows`: a head's rows 0 1 2 3 4 5 become 0 3 1 4 2 5."""
    halves = rows.view(heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)
