"""Tiny checkpoints in every low-bit format, written out from the formats' own definitions.

Nothing of the package takes part: codes, zeros and scales are made here, and so is the weight that
they stand for, in float64.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints
import torch
from released_formats import FP8
from torch import Tensor

from mistral_kernels.model.config import ModelConfig

DENSE = checkpoints.tiny_config(hidden=64, ffn_dim=96, head_dim=16)
MOE = checkpoints.tiny_config(hidden=64, ffn_dim=96, head_dim=16, experts=3, top_k=2)


class Codes(NamedTuple):
    """A matrix in few bits: `group[i]` is the group of column i; zeros may be all the same."""

    codes: Tensor  # (rows, columns), int64, >= 0; or FP8
    zeros: Tensor  # (rows, groups), int64
    scales: Tensor  # (rows, groups)
    group: Tensor  # (columns,), int64
    bits: int

    def exact(self) -> Tensor:
        """The weight in float64."""
        difference = self.codes.double() - self.zeros.double()[:, self.group]
        return difference * self.scales.double()[:, self.group]


class Kind(NamedTuple):
    """A format: its section of the configuration, and the tensors of one matrix."""

    section: dict[str, Any]
    tensors: Callable[[Codes], dict[str, Tensor]]
    bits: int = 4
    size: int | None = 32  # columns of a group
    symmetric: bool = False
    scales: torch.dtype = torch.float16
    floating: bool = False
    act_order: bool = False
    rows: int = 1  # that share a scale; 0: all
    native: bool = False  # the only layout that such files have

    def round(self, weight: Tensor, shuffle: Tensor) -> Codes:
        """The nearest codes; `shuffle`: a permutation of columns, for act-order."""
        (rows, columns), size = weight.shape, self.size or weight.shape[1]
        group = torch.arange(columns) // size
        if self.act_order:
            group = group[shuffle]
        members = weight[:, group.argsort(stable=True)].view(rows, -1, size)
        high, low = members.amax(2), members.amin(2)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        share = self.rows or rows
        high, low = (
            x.unflatten(0, (-1, share)).amax(1)
            if x is high
            else x.unflatten(0, (-1, share)).amin(1)
            for x in (high, low)
        )
        high, low = (x.repeat_interleave(share, 0) for x in (high, low))
        if self.floating:
            scales = (high / 448).to(self.scales)
            codes = (weight / scales.float()[:, group]).to(FP8)
            return Codes(codes, torch.zeros(scales.shape), scales, group, 8)
        top = 2**self.bits - 1
        scales = ((high - low) / top).to(self.scales)
        zeros = torch.full(scales.shape, (top + 1) // 2)
        if not self.symmetric:
            zeros = (-low / scales.float()).round().clamp(0, top).long()
        codes = (weight / scales.float()[:, group]).round() + zeros[:, group]
        return Codes(codes.clamp(0, top).long(), zeros, scales, group, self.bits)


def words(codes: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """32-bit words of neighbours along a dimension; `order` is that from the lowest bits on."""
    per_word = 32 // bits
    parts = codes.long().unflatten(dim, (-1, per_word)).movedim(dim + 1, 0)
    packed = sum(parts[source] << bits * at for at, source in enumerate(order or range(per_word)))
    return (packed - ((packed >> 31) << 32)).int().contiguous()


def awq(c: Codes) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(c.codes.T, 4, 1, order),
        "qzeros": words(c.zeros.T, 4, 1, order),
        "scales": c.scales.T.contiguous(),
    }


def gptq(c: Codes, stored_zeros: int = -1) -> dict[str, Tensor]:
    one = sum(1 << c.bits * i for i in range(32 // c.bits))
    qzeros = words(c.zeros.T, c.bits, 1).long() + stored_zeros * one
    return {
        "qweight": words(c.codes.T, c.bits, 0),
        "qzeros": ((qzeros + 2**31) % 2**32 - 2**31).int(),
        "scales": c.scales.T.contiguous(),
        "g_idx": c.group.int(),
        "bias": torch.zeros(len(c.codes), dtype=torch.float16),
    }


def gptq_v2(c: Codes) -> dict[str, Tensor]:
    return gptq(c, stored_zeros=0)


def packed(c: Codes) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": words(c.codes, c.bits, 1),
        "weight_scale": c.scales,
        "weight_shape": torch.tensor(c.codes.shape),
    }
    if (c.zeros != 2 ** (c.bits - 1)).any():
        tensors["weight_zero_point"] = words(c.zeros, c.bits, 0)
    if (c.group.diff() < 0).any():
        tensors["weight_g_idx"] = c.group.int()
    return tensors


def integers(c: Codes) -> dict[str, Tensor]:
    middle = 2 ** (c.bits - 1)
    tensors = {"weight": (c.codes - middle).to(torch.int8), "weight_scale": c.scales}
    if (c.zeros != middle).any():
        tensors["weight_zero_point"] = (c.zeros - middle).to(torch.int8)
    return tensors


def floats(name: str, rows: int = 1, *extra: str) -> Callable[[Codes], dict[str, Tensor]]:
    """Of blocks of so many rows, of all rows for 0: one scale, and others beside it."""

    def tensors(c: Codes) -> dict[str, Tensor]:
        scales = c.scales[:: rows or len(c.scales)].contiguous()
        scales = scales if rows else scales.flatten()[0].clone()
        return {"weight": c.codes, name: scales} | {key: torch.tensor(0.5) for key in extra}

    return tensors


def compressed(stored: str, **weights: Any) -> dict[str, Any]:
    """A section as llm-compressor writes it."""
    group = {
        "targets": ["Linear"],
        "weights": {"type": "int", "num_bits": 4, "symmetric": True} | weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
GROUPS = {"strategy": "group", "group_size": 32}
ROWS = {"strategy": "channel", "num_bits": 8}
FLOATS = {"type": "float", "num_bits": 8}
NATIVE_FP8 = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
HF_FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
BF16 = torch.bfloat16
KINDS = {
    "awq": Kind(AWQ, awq),
    "awq-symmetric": Kind(AWQ | {"zero_point": False}, awq, symmetric=True),
    "gptq": Kind(GPTQ, gptq),
    "gptq-act-order": Kind(GPTQ | {"desc_act": True}, gptq, act_order=True),
    "gptq-symmetric-rows": Kind(
        GPTQ | {"sym": True, "group_size": -1}, gptq, size=None, symmetric=True
    ),
    "gptq-v2-8-bits": Kind(GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, gptq_v2, 8),
    "gptq-8-bits": Kind(GPTQ | {"bits": 8, "desc_act": True}, gptq, 8, act_order=True),
    "packed": Kind(compressed("pack-quantized", **GROUPS), packed, symmetric=True, scales=BF16),
    "packed-zeros": Kind(
        compressed("pack-quantized", symmetric=False, **GROUPS), packed, scales=BF16
    ),
    "packed-act-order": Kind(
        compressed("pack-quantized", symmetric=False, actorder="group", **GROUPS),
        packed,
        act_order=True,
    ),
    "packed-8-bits-rows": Kind(
        compressed("pack-quantized", symmetric=False, **ROWS), packed, 8, None, scales=BF16
    ),
    "int8-rows": Kind(compressed("int-quantized", **ROWS), integers, 8, None, True, BF16),
    "int8-zeros": Kind(
        compressed("int-quantized", num_bits=8, symmetric=False, **GROUPS), integers, 8
    ),
    "naive-int4": Kind(compressed("naive-quantized", symmetric=False, **GROUPS), integers),
    "fp8-rows": Kind(
        compressed("float-quantized", strategy="channel", **FLOATS),
        floats("weight_scale"),
        *(8, None, True, BF16, True),
    ),
    "fp8-tensor": Kind(
        compressed("float-quantized", strategy="tensor", **FLOATS),
        floats("weight_scale", 0, "input_scale", "kv_scale"),
        *(8, None, True, torch.float32, True),
        rows=0,
    ),
    "fp8-blocks": Kind(
        compressed("float-quantized", strategy="block", block_structure=[16, 32], **FLOATS),
        floats("weight_scale", 16),
        *(8, 32, True, BF16, True),
        rows=16,
    ),
    "fp8-native": Kind(
        NATIVE_FP8,
        floats("qscale_weight", 0, "qscale_act"),
        *(8, None, True, torch.float32, True),
        rows=0,
        native=True,
    ),
    "fp8-huggingface": Kind(
        HF_FP8,
        floats("weight_scale_inv", 0, "activation_scale"),
        *(8, None, True, BF16, True),
        rows=0,
    ),
}


def is_quantised(key: str) -> bool:
    """Whether a tensor is one of those that the formats quantise."""
    return "layers." in key and "norm" not in key and ".gate." not in key


def write(
    folder: Path,
    config: ModelConfig,
    kind: Kind,
    *,
    shards: int = 1,
    ignored: Callable[[str], bool] = lambda key: False,
) -> dict[str, Tensor]:
    """Writes a checkpoint of the kind, and one of the full weights that it stands for.

    Args:
        folder: gets the folders "low" and "full".
        config: the model; `interleaved` is the layout.
        kind: the format.
        shards: number of files of "low".
        ignored: whether a matrix is left in full.

    Returns:
        The tensors of "low".
    """
    tensors = checkpoints.native_tensors(config)
    writer, file = checkpoints.write_native, "params.json"
    if not config.interleaved:
        tensors = checkpoints.huggingface_tensors(tensors, config)
        writer, file = checkpoints.write_huggingface, "config.json"
    low, full = {}, {}
    shuffles = {}
    for key, tensor in tensors.items():
        full[key] = low[key] = tensor.contiguous()
        if is_quantised(key) and not ignored(key):
            # GPTQ orders columns by what goes in: wq, wk and wv have one order, w1 and w3 another.
            inputs = (*key.split(".")[:-2], key.split(".")[-2] in ("wo", "o_proj"), tensor.shape[1])
            shuffle = shuffles.setdefault(inputs, torch.randperm(tensor.shape[1]))
            codes = kind.round(tensor, shuffle)
            del low[key]
            owner = key.removesuffix("weight")
            low |= {owner + name: part for name, part in kind.tensors(codes).items()}
            full[key] = codes.exact()
    full = {key: tensor.double() for key, tensor in full.items()}
    writer(folder / "full", config, full)
    writer(folder / "low", config, low, shards=shards)
    section = "quantization" if kind.native else "quantization_config"
    path = folder / "low" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {section: kind.section}))
    return low
