"""The model's weights as the tensors of a checkpoint: views of the parameters, in either layout."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.layouts import Layout
from mistral_kernels.model.weight_table import (
    Place,
    checkpoint_table,
    half_split_rows,
    huggingface_table,
    interleaved_rows,
)


class WeightView(NamedTuple):
    """One tensor of a checkpoint, as a part of the parameter that holds it.

    `heads` is set for a wq or wk whose rows the checkpoint has in another order than the model;
    `half_split` then says which of the two orders is the checkpoint's.
    """

    parameter: Tensor
    place: Place
    heads: int | None
    half_split: bool

    @property
    def nbytes(self) -> int:
        return self.part.nbytes

    @property
    def part(self) -> Tensor:
        """The part of the parameter, rows in the model's order."""
        whole = self.parameter.shape == self.place.shape
        return self.parameter if whole else self.parameter[self.place.index]

    def read(self) -> Tensor:
        """The tensor as the checkpoint has it: a view, or a copy where rows change places."""
        if self.heads is None:
            return self.part
        return (half_split_rows if self.half_split else interleaved_rows)(self.part, self.heads)

    def write(self, tensor: Tensor) -> None:
        """Copies a tensor of the checkpoint into the model; device and dtype are converted."""
        if self.heads is not None:
            reorder = interleaved_rows if self.half_split else half_split_rows
            tensor = reorder(tensor.contiguous(), self.heads)
        self.part.copy_(tensor)


def weight_views(
    parameters: Mapping[str, Tensor], config: ModelConfig, layout: Layout
) -> dict[str, WeightView]:
    """All tensors of a checkpoint of this model.

    Args:
        parameters: name to tensor, as `parameter_shapes(config)` has them, or some of those.
        config: the model, of either rope layout.
        layout: names and order of rows of the checkpoint.

    Returns:
        Key to view, in the order of the model; together they cover every parameter given once.
    """
    heads = {"wq": config.q_heads, "wk": config.kv_heads}
    half_split = layout == "huggingface"
    native = checkpoint_table(config)
    keys = huggingface_table(config, stacked=False) if half_split else native
    views = {}
    for key, (native_key, place) in zip(keys, native.items(), strict=True):
        if place.parameter not in parameters:
            continue
        reordered = (
            heads.get(native_key.split(".")[-2]) if half_split == config.interleaved else None
        )
        views[key] = WeightView(parameters[place.parameter], place, reordered, half_split)
    return views
