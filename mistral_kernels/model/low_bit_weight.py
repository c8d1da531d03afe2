"""A weight that stays in few bits: the module that holds one in the layout of `ops.low_bit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral_kernels.ops.low_bit import BITS, INT4, LowBit

# Integers of the sizes that the tensors' elements have.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class LowBitForm(NamedTuple):
    """What tensors make up a low-bit weight, whatever its shape."""

    codes: torch.dtype  # INT4, INT8 or FP8
    group_size: int  # columns that share a scale; all of them where it is one a row
    scales: torch.dtype
    zeros: bool
    perm: bool

    @property
    def bits(self) -> int:
        return BITS[self.codes]

    def empty(self, shape: tuple[int, ...], device: torch.device | str) -> LowBit:
        """An uninitialised weight (..., out, in)."""
        *rows, columns = shape
        groups = columns // self.group_size

        def tensor(dtype: torch.dtype, *size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        return LowBit(
            tensor(self.codes, *rows, columns // 2 if self.codes == INT4 else columns),
            tensor(self.scales, *rows, groups),
            tensor(self.codes, *rows, groups) if self.zeros else None,
            tensor(torch.int32, *rows[:-1], columns) if self.perm else None,
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight (..., out, in) takes."""
        return sum(t.nbytes for t in self.empty(shape, "meta") if t is not None)


class LowBitWeight(nn.Module):
    """One weight in few bits.

    Its tensors follow the model to another device. Their dtypes are the format's, so that a change
    of the model's dtype leaves them alone; they are buffers, as nothing trains them.

    Args:
        form: what tensors there are.
        shape: of the weight, (..., out, in).
        device: where; the tensors are left uninitialised.
    """

    def __init__(self, form: LowBitForm, shape: tuple[int, ...], device: torch.device | str):
        super().__init__()
        self.form, self.shape = form, shape
        for name, tensor in form.empty(shape, device)._asdict().items():
            self.register_buffer(name, tensor)

    @property
    def tensors(self) -> LowBit:
        """The weight in the layout."""
        # Several times faster than by their names, which nn.Module looks up; once a layer and step.
        return LowBit(*self._buffers.values())

    @property
    def whole_rows(self) -> bool:
        """Whether one group is one row."""
        return self.form.group_size == self.shape[-1]

    def _apply(self, fn, recurse=True):
        # As integers, which no change of dtype touches; FP8 codes count as floating to torch.
        for name, tensor in self._buffers.items():
            if tensor is not None:
                integers = tensor.view(INTEGERS[tensor.element_size()])
                self._buffers[name] = fn(integers).view(tensor.dtype)
        return self

    def extra_repr(self) -> str:
        rows = "row" if self.whole_rows else f"{self.form.group_size} columns"
        return f"{tuple(self.shape)}, {self.form.bits} bits, a scale for each {rows}"


def layer_forms(forms: Mapping[str, LowBitForm], layer: int) -> dict[str, LowBitForm]:
    """The forms of one layer's weights, by the last part of their names."""
    prefix = f"layers.{layer}."
    found = (item for item in forms.items() if item[0].startswith(prefix))
    return {name.rpartition(".")[2]: form for name, form in found}


def refuse_low_bit(module: nn.Module, doing: str) -> None:
    """Raises a ValueError if a module holds low-bit weights, for what only full ones can do."""
    if any(isinstance(part, LowBitWeight) for part in module.modules()):
        raise ValueError(
            f"{doing}: the model's weights are in few bits; load it with dequantise=True"
        )
