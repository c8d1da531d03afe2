"""Models with random weights, in full or in few bits: as fast as trained ones of their shape.

No step depends on a weight's value, except for the choice of experts, which here is about even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.low_bit_joined import LOW_BIT
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.model.weight_table import parameter_shapes
from mistral_kernels.ops.low_bit import FP8, INT4, INT8, quantise

STD = 0.02  # of the weights, as transformers draws them
# Name -> codes, group size (None: the row): the formats that checkpoints have.
FORMATS = {"int4": (INT4, 128), "int8": (INT8, None), "fp8": (FP8, None)}


def low_bit_forms(
    config: ModelConfig, name: str, scales: torch.dtype, group_size: int | None = None
) -> dict[str, LowBitForm]:
    """The forms of a model's projections; embeddings, norms and router stay in full.

    Args:
        config: the model.
        name: of FORMATS. A row that is narrower than a group is one group.
        scales: their dtype.
        group_size: None: as in FORMATS.

    Returns:
        Name of the weight to its form, as `Transformer` takes them.

    Raises:
        ValueError: the groups do not divide a row; the size that is at fault is named.
    """
    codes, usual_size = FORMATS[name]
    group_size = group_size or usual_size
    sizes = {"wqkv": "hidden", "wo": "q_heads * head_dim", "w13": "hidden", "w2": "ffn_dim"}
    forms = {}
    for weight, shape in parameter_shapes(config).items():
        leaf, columns = weight.rpartition(".")[2], shape[-1]
        if leaf not in LOW_BIT:
            continue
        group = columns if group_size is None else min(group_size, columns)
        if columns % group:
            raise ValueError(
                f"{name}: {sizes[leaf]}: expected a multiple of the group size {group},"
                f" got {columns}"
            )
        forms[weight] = LowBitForm(codes, group, scales, zeros=False, perm=False)
    return forms


def random_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights: str | None = None,
    backend: str = "auto",
    max_batch_size: int = 1,
) -> Transformer:
    """A model with normal weights and norms of 1, from torch's generator of the device.

    Args:
        config: its shape.
        dtype, device, backend, max_batch_size: as `Transformer` takes them.
        weights: of FORMATS: the projections are rounded to it, each as it is drawn, so that no more
            than one of them is there in full. None: all in full.
    """
    low_bit = low_bit_forms(config, weights, dtype) if weights else None
    model = Transformer(
        config,
        device=device,
        dtype=dtype,
        low_bit=low_bit,
        backend=backend,
        max_batch_size=max_batch_size,
    )
    for name, shape in parameter_shapes(config).items():
        if low_bit and name in low_bit:
            _fill(model, name, torch.empty(shape, dtype=dtype, device=device).normal_(std=STD))
        elif len(shape) == 1:
            model.get_parameter(name).fill_(1)
        else:
            model.get_parameter(name).normal_(std=STD)
    return model


def in_few_bits(
    full: Transformer, weights: str, *, group_size: int | None = None, backend: str = "auto"
) -> Transformer:
    """A copy of a model in full, its projections rounded to the nearest codes.

    Args:
        full: the model; it keeps its weights.
        weights: of FORMATS.
        group_size: None: as there.
        backend: of the copy, as `Transformer` takes it.

    Raises:
        ValueError: see `low_bit_forms`.
    """
    model = Transformer(
        full.config,
        device=full.device,
        dtype=full.dtype,
        low_bit=low_bit_forms(full.config, weights, full.dtype, group_size),
        backend=backend,
        max_batch_size=full.max_batch_size,
    )
    for name, value in full.named_parameters():
        _fill(model, name, value)
    return model


def _fill(model: Transformer, name: str, value: Tensor) -> None:
    """Writes a weight of the model, rounded where the model has it in few bits."""
    form = model.low_bit.get(name)
    if form is None:
        model.get_parameter(name).copy_(value)
        return
    weight = model.get_submodule(name).tensors
    # One expert at a time: rounding takes several times the bytes of what it rounds.
    for index in range(len(value)) if value.dim() == 3 else [slice(None)]:
        rounded = quantise(value[index], form.codes, form.group_size)
        for kept, tensor in zip(weight.part(index), rounded, strict=True):
            if kept is not None:
                kept.copy_(tensor)
