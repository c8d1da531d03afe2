"""Argument checks of the public functions: every message names op, argument, expected, got."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTISED = (torch.int8, torch.float8_e4m3fn)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the reference computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_int(value: object) -> bool:
    """Whether `value` is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(op: str, name: str, value: int, minimum: int, *, symbolic: bool = False) -> None:
    """Raises TypeError or ValueError unless `value` is an int (or torch's symbol of one) from
    `minimum` on."""
    if not is_int(value) and not (symbolic and isinstance(value, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be >= {minimum}, got {value}")


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float and no bool."""
    return isinstance(value, float) or is_int(value)


class Arguments:
    """Checks the arguments of one call. A dimension's name is bound by its first use.

    >>> check = Arguments("linear")
    >>> check.tensor("x", torch.zeros(3, 8), ("tokens", "hidden"))
    >>> check.tensor("weight", torch.zeros(5, 9), ("out", "hidden"))
    Traceback (most recent call last):
        ...
    ValueError: linear: weight must have shape (out, hidden=8), got (5, 9)
    """

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None

    def tensor(
        self,
        name: str,
        value: Tensor,
        dims: Sequence[str],
        dtypes: Sequence[torch.dtype] = FLOATS,
    ) -> None:
        """Checks type, device (that of the first tensor), dtype, shape, and stride 1 at the end.

        `dims` are names, or a number for a fixed size; a leading "..." stands for any dimensions.
        """
        self.is_tensor(name, value)
        device, dtype, shape = value.device, value.dtype, value.shape  # each costs a call to torch
        if self.device is None:
            self.device = device
        # No op has a forward-mode derivative; without this it would silently be zero.
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{self.op}: {name} carries a forward-mode tangent, which no op supports;"
                " use reverse mode"
            )
        if device != self.device:
            raise ValueError(f"{self.op}: {name} must be on {self.device}, got {device}")
        if dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{self.op}: {name} must be {expected}, got {dtype}")
        if not self._bind(dims, shape):
            raise ValueError(
                f"{self.op}: {name} must have shape {self._describe(dims)}, got {tuple(shape)}"
            )
        if shape and shape[-1] > 1 and value.stride(-1) != 1:
            raise ValueError(
                f"{self.op}: {name} must have a contiguous last dimension,"
                f" got strides {value.stride()}"
            )

    def _bind(self, dims: Sequence[str], shape: torch.Size) -> bool:
        """Gives the sizes of a shape to the names in `dims`: all or, where one differs, none."""
        if dims[0] == "...":
            dims = dims[1:]
            shape = shape[len(shape) - len(dims) :]
        if len(shape) != len(dims):
            return False
        sizes = self.sizes.copy()
        # A plain loop: every tensor of every call of every op comes through here.
        for dim, size in zip(dims, shape, strict=True):
            if size != (dim if isinstance(dim, int) else sizes.setdefault(dim, size)):
                return False
        self.sizes = sizes
        return True

    def is_tensor(self, name: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.op}: {name} must be a torch.Tensor, got {type(value).__name__}")

    def _describe(self, dims: Sequence[str]) -> str:
        parts = [f"{dim}={self.sizes[dim]}" if dim in self.sizes else str(dim) for dim in dims]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def integer(self, name: str, value: int, minimum: int) -> None:
        check_int(self.op, name, value, minimum, symbolic=True)

    def positive(self, name: str, value: float, *, zero: bool = False) -> None:
        """Checks a finite float > 0 (or >= 0 with `zero`)."""
        if not is_number(value):
            raise TypeError(f"{self.op}: {name} must be a float, got {type(value).__name__}")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            bound = ">= 0" if zero else "> 0"
            raise ValueError(f"{self.op}: {name} must be finite and {bound}, got {value}")

    def flag(self, name: str, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{self.op}: {name} must be a bool, got {type(value).__name__}")

    def window(self, window: int | None) -> None:
        if window is not None:
            self.integer("window", window, 1)

    def backend(self, backend: str) -> None:
        if not isinstance(backend, str):
            raise TypeError(f"{self.op}: backend must be a str, got {type(backend).__name__}")

    def together(self, **values: object) -> bool:
        """True if all values are given, False if none is; anything between is an error."""
        given = [name for name, value in values.items() if value is not None]
        if given and len(given) < len(values):
            missing = ", ".join(name for name in values if name not in given)
            raise ValueError(
                f"{self.op}: {', '.join(values)} must be given together, got no {missing}"
            )
        return bool(given)

    def group(self) -> None:
        """Checks that the bound q_heads share the bound kv_heads evenly."""
        q_heads, kv_heads = self.sizes["q_heads"], self.sizes["kv_heads"]
        if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
            raise ValueError(
                f"{self.op}: q_heads {q_heads} is not a positive multiple of kv_heads {kv_heads}"
            )

    def offsets(self, name: str, value: Tensor) -> None:
        """Checks int32 offsets (batch + 1,); binds batch, or compares with it if bound."""
        self.tensor(name, value, ("batch + 1",), (torch.int32,))
        batch = self.sizes.setdefault("batch", len(value) - 1)
        if len(value) != batch + 1 or batch < 0:
            expected = f"batch + 1 = {batch + 1}" if batch >= 0 else "at least 1"
            raise ValueError(f"{self.op}: {name} must have length {expected}, got {len(value)}")

    def written(self, name: str, value: Tensor) -> None:
        """Checks a tensor that is written in place: no two elements may share memory."""
        steps = value.stride()
        if 0 in steps and any(
            size > 1 and not step for size, step in zip(value.shape, steps, strict=True)
        ):
            raise ValueError(
                f"{self.op}: {name} must not be an expanded view, it is written in place;"
                f" got strides {steps}"
            )

    def scale(self, scale: float | None, head_dim: int) -> float:
        """The factor of q . k, head_dim ** -0.5 unless given."""
        self.integer("head_dim", head_dim, 1)
        if scale is None:
            return head_dim**-0.5
        self.positive("scale", scale)
        return float(scale)
