"""Low-rank adapters, merged into the weights: W += scaling * B @ A.

Source: https://arxiv.org/abs/2106.09685; the file format is that of mistral-finetune.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.weight_table import Place, checkpoint_table
from mistral_kernels.model.weights import (
    Stored,
    check_dtype,
    check_parameters,
    check_shape,
    open_safetensors,
    read_headers,
)
from mistral_kernels.ops.checks import is_number

# Adapters exist for these matrices only: never for embeddings, norms, output or the MoE gate.
ADAPTER_KEY = re.compile(
    r"(?P<matrix>layers\.\d+\.(attention\.w[qkvo]|feed_forward\.(experts\.\d+\.)?w[123]))"
    r"\.lora_(?P<factor>[AB])\.weight"
)


class Adapter(NamedTuple):
    """The two factors for one matrix: `a` (rank, in) and `b` (out, rank)."""

    place: Place
    a: Stored
    b: Stored
    heads: int | None  # of a wq or wk, whose rows follow the rope layout; None for the others


@torch.no_grad()
def merge_lora(
    parameters: Mapping[str, Tensor],
    config: ModelConfig,
    path: str | Path,
    scaling: float = 2.0,
) -> None:
    """Adds a Mistral-native adapter to a model's weights; all is checked before any is changed.

    Args:
        parameters: name to tensor, as `parameter_shapes(config)` has them; changed in place. The
            sum is computed in float32 (float64 for float64 weights) and rounded once.
        config: the model, of either rope layout.
        path: a `lora.safetensors` file, or a folder that holds one.
        scaling: factor of the update; the file does not hold it.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the scaling is no number.
        ValueError: the scaling is not finite, or the file is malformed, holds no adapter, half an
            adapter, or one that does not fit the model; file and key are named.
    """
    if not is_number(scaling):
        raise TypeError(f"merge_lora: scaling: expected a number, got {type(scaling).__name__}")
    if not math.isfinite(scaling):
        raise ValueError(f"merge_lora: scaling: expected a finite number, got {scaling!r}")
    check_parameters(parameters, config)
    path = Path(path)
    if path.is_dir():
        path = path / "lora.safetensors"
    adapters = _read_adapters(path, config)
    with open_safetensors(path) as file:
        for adapter in adapters:
            weight = parameters[adapter.place.parameter][adapter.place.index]
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            a, b = (file.get_tensor(s.key).to(weight.device, dtype) for s in (adapter.a, adapter.b))
            if adapter.heads and not config.interleaved:
                b = half_split_rows(b, adapter.heads)
            weight.copy_(torch.addmm(weight.to(dtype), b, a, alpha=scaling))


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


def _read_adapters(path: Path, config: ModelConfig) -> list[Adapter]:
    """Pairs the factors in a file with the matrices they change; what does not fit is refused."""
    table = checkpoint_table(config)
    factors: dict[str, dict[str, Stored]] = {}
    for key, stored in read_headers([path]).items():
        match = ADAPTER_KEY.fullmatch(key)
        if not match or f"{match['matrix']}.weight" not in table:
            raise ValueError(f"{path}: {key}: not an adapter of a matrix of this model")
        check_dtype(stored)
        factors.setdefault(match["matrix"], {})[match["factor"]] = stored
    if not factors:
        raise ValueError(f"{path}: holds no lora_A and lora_B tensors")
    heads = {"wq": config.q_heads, "wk": config.kv_heads}
    adapters = []
    for matrix, pair in factors.items():
        for factor in "AB":
            if factor not in pair:
                raise ValueError(f"{path}: {matrix}.lora_{factor}.weight: missing")
        place = table[f"{matrix}.weight"]
        rank = pair["A"].shape[0] if pair["A"].shape else 1
        check_shape(pair["A"], (rank, place.shape[1]))
        check_shape(pair["B"], (place.shape[0], rank))
        adapters.append(Adapter(place, pair["A"], pair["B"], heads.get(matrix.rpartition(".")[2])))
    return adapters
