"""Random low-bit weights of the formats that checkpoints have, and the bytes that a call reads."""

import torch

from mistral_kernels.model import random_weights
from mistral_kernels.ops.low_bit import INT4, LowBit, quantise

# Name -> codes, group size (None: the row).
FORMATS = {
    f"{name}-g{group_size}" if group_size else name: (codes, group_size)
    for name, (codes, group_size) in random_weights.FORMATS.items()
} | {"int4-g32": (INT4, 32)}


def random_weight(shape: tuple[int, ...], name: str, dtype: torch.dtype, device: str) -> LowBit:
    codes, group_size = FORMATS[name]
    weight = torch.randn(shape, dtype=dtype, device=device) / shape[-1] ** 0.5
    return quantise(weight, codes, group_size)


def group_of(name: str) -> dict[str, int | None]:
    """The keyword arguments of the ops."""
    codes, group_size = FORMATS[name]
    return {"bits": 4 if codes == INT4 else 8, "group_size": group_size}


def weight_bytes(rows: int, columns: int, name: str, scale_dtype: torch.dtype) -> int:
    """Of codes and scales of a (rows, columns) weight."""
    how = group_of(name)
    groups = columns // (how["group_size"] or columns)
    return rows * (columns * how["bits"] // 8 + groups * scale_dtype.itemsize)
