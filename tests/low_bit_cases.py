"""Low-bit weights for the tests of both ops: every kind of code, of group and of scale."""

from typing import NamedTuple

import torch

from mistral_kernels.ops.low_bit import FP8, INT4, INT8, LowBit, quantise


class Kind(NamedTuple):
    """How a weight is stored; `group_size` None is one group a row."""

    codes: torch.dtype
    group_size: int | None
    symmetric: bool = True
    scales: torch.dtype = torch.bfloat16
    shuffled: bool = False  # act-order

    @property
    def bits(self) -> int:
        return 4 if self.codes == INT4 else 8

    @property
    def how(self) -> dict[str, int | None]:
        """The keyword arguments of the ops."""
        return {"bits": self.bits, "group_size": self.group_size}


KINDS = {
    "int4-g32": Kind(INT4, 32),
    "int4-g64-float16": Kind(INT4, 64, scales=torch.float16),
    "int4-g128-zeros": Kind(INT4, 128, symmetric=False, scales=torch.float16),
    "int4-row": Kind(INT4, None, scales=torch.float32),
    "int4-row-zeros": Kind(INT4, None, symmetric=False),
    "int4-g32-act-order": Kind(INT4, 32, symmetric=False, shuffled=True),
    "int8-row": Kind(INT8, None),
    "int8-g128": Kind(INT8, 128, scales=torch.float32),
    "int8-g32-zeros-act-order": Kind(INT8, 32, symmetric=False, shuffled=True),
    "fp8-row": Kind(FP8, None, scales=torch.float32),
    "fp8-g128": Kind(FP8, 128),
}


def low_bit(shape: tuple[int, ...], kind: Kind, device: str = "cpu") -> LowBit:
    """Return a random weight (..., out, in); the scales of its groups differ by far."""
    weight = torch.randn(shape, device=device) * torch.rand(*shape[:-1], 1, device=device) * 0.1
    weight += 0.02 * torch.rand(*shape[:-1], 1, device=device)  # so that zeros are off the middle
    low = quantise(weight.to(kind.scales), kind.codes, kind.group_size, symmetric=kind.symmetric)
    if kind.shuffled:
        leading = shape[:-2]
        perm = torch.rand(*leading, shape[-1], device=device).argsort(-1).int()
        low = low._replace(perm=perm)
    return low
