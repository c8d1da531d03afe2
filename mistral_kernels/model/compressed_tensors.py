"""Low-bit weights as compressed-tensors stores them, and the configuration that tells of them.

A matrix `m` becomes `m.weight_packed`, `m.weight_scale` and `m.weight_shape` for 4 bits, `m.weight`
and `m.weight_scale` for 8. The packed words are the bytes of `ops.low_bit`, read as int32.

Source: compressors/pack_quantized and naive_quantized, QuantizationConfig and QuantizationScheme of
compressed-tensors 0.20.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mistral_kernels.ops.low_bit import BITS, FP8, INT4, INT8, LowBit

FORMATS = {INT4: "pack-quantized", INT8: "int-quantized", FP8: "float-quantized"}
VERSION = "0.20.0"  # of the package whose files these are like


def stored_tensors(key: str, weight: LowBit) -> dict[str, Tensor]:
    """The tensors that stand for the weight `key`, such as "model.layers.0.mlp.up_proj.weight"."""
    if weight.qweight.dtype != INT4:
        return {key: weight.qweight, f"{key}_scale": weight.scales}
    return {
        f"{key}_packed": weight.qweight.view(torch.int32),
        f"{key}_scale": weight.scales,
        f"{key}_shape": torch.tensor(weight.shape),
    }


def stored_weight(key: str, tensors: Mapping[str, Tensor]) -> LowBit:
    """The inverse of `stored_tensors`: a view of the tensors."""
    codes = tensors[key] if key in tensors else tensors[f"{key}_packed"].view(INT4)
    return LowBit(codes, tensors[f"{key}_scale"])


def quantization_config(
    kind: torch.dtype, group_size: int | None, *, ordered: bool, ignored: list[str]
) -> dict[str, Any]:
    """What config.json says of such weights.

    Args:
        kind: INT4, INT8 or FP8.
        group_size: columns that share a scale; None: a whole row.
        ordered: columns were rounded in the order of their inputs (which leaves no trace).
        ignored: linear modules that are not quantised.

    Returns:
        The value of "quantization_config".
    """
    weights = {
        "num_bits": BITS[kind],
        "type": "float" if kind == FP8 else "int",
        "symmetric": True,
        "group_size": group_size,
        "strategy": "group" if group_size else "channel",
        "dynamic": False,
    } | ({"actorder": "weight"} if ordered else {})
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMATS[kind],
    }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "config_groups": {"group_0": scheme},
        "kv_cache_scheme": None,
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ignored,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
    }
