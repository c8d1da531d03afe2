"""Buffers between guard bands, through which tests hand tensors to a kernel.

    with GuardBands() as guard:
        out = guard.output(x.shape, x.dtype)
        launch(guard(x), guard(cache, mutated=True), out)

What is made by `new_empty` in the block is such an output, too.

A kernel that reads outside of its tensor gets NaN, or a huge integer; one that writes there, into
the gaps between strided rows, or to an input, fails at the end of the block. AddressSanitizer ends
the process at the access itself, in the bands.
"""

import ctypes
from typing import NamedTuple, Self
from unittest import mock

import torch

BAND_BYTES = 256
ALIGNMENT = 64  # of torch's own memory; a copy keeps the original's place within it
# Patterns of memory that is nobody's, by whether the dtype is one of floating point.
PATTERN = {True: 0xFF, False: 0x7F}


class Guarded(NamedTuple):
    name: str
    buffer: torch.Tensor  # bytes: band, tensor, band
    begin: int  # of the tensor
    end: int
    before: torch.Tensor  # the buffer as the kernel got it
    writable: torch.Tensor  # of the buffer's bytes, those that may change


class GuardBands:
    """Copies tensors between bands, and checks at the end of its block what was written."""

    def __init__(self) -> None:
        self.guarded: list[Guarded] = []
        self.new_empty = mock.patch.object(
            torch.Tensor, "new_empty", lambda *how, **kind: self._new_empty(*how, **kind)
        )

    def __enter__(self) -> Self:
        self.new_empty.start()
        return self

    def __call__(self, tensor: torch.Tensor | None, *, mutated: bool = False):
        """Return a copy of `tensor` with its strides and alignment; None stays None."""
        if tensor is None:
            return None
        size, steps = tensor.element_size(), tensor.stride()
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, steps, strict=True))
        bytes_used = span * size if tensor.numel() else 0
        pattern = PATTERN[tensor.is_floating_point()]
        length = bytes_used + 2 * BAND_BYTES + ALIGNMENT
        buffer = torch.full((length,), pattern, dtype=torch.uint8)
        begin = BAND_BYTES + (tensor.data_ptr() - buffer.data_ptr() - BAND_BYTES) % ALIGNMENT
        end = begin + bytes_used

        copy = buffer[begin:end].view(tensor.dtype).as_strided(tensor.shape, steps)
        once = [slice(None) if step else slice(1) for step in steps]  # of an expanded dimension
        copy[tuple(once)].copy_(tensor[tuple(once)])
        writable = torch.zeros(length, dtype=torch.bool)
        if mutated:
            byte_steps = (*(step * size for step in steps), 1)
            writable.as_strided((*tensor.shape, size), byte_steps, begin).fill_(True)
        name = f"argument {len(self.guarded)}, {tensor.dtype} {tuple(tensor.shape)}"
        self.guarded.append(Guarded(name, buffer, begin, end, buffer.clone(), writable))
        self._poison("__asan_poison_memory_region")
        return copy

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a contiguous tensor of NaN, or of huge integers, that the kernel may write."""
        pattern = PATTERN[dtype.is_floating_point]
        size = torch.empty((), dtype=dtype).element_size()
        filled = torch.full((*shape, size), pattern, dtype=torch.uint8)
        return self(filled.view(dtype).view(shape), mutated=True)

    def _new_empty(self, like: torch.Tensor, *shape, dtype: torch.dtype | None = None):
        sizes = shape if all(isinstance(size, int) for size in shape) else shape[0]
        return self.output(tuple(sizes), dtype or like.dtype)

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self.new_empty.stop()
        self._poison("__asan_unpoison_memory_region")
        if error_type is None:
            for guarded in self.guarded:
                check(guarded)

    def _poison(self, function: str) -> None:
        """Calls AddressSanitizer, where it is loaded, on all bands."""
        call = getattr(ctypes.CDLL(None), function, None)
        for _, buffer, begin, end, *_ in self.guarded if call else ():
            base = buffer.data_ptr()
            call(ctypes.c_void_p(base), ctypes.c_size_t(begin))
            call(ctypes.c_void_p(base + end), ctypes.c_size_t(len(buffer) - end))


def check(guarded: Guarded) -> None:
    """Assert that only what may be written has changed."""
    name, buffer, begin, end, before, writable = guarded
    wrong = ((buffer != before) & ~writable).nonzero().flatten()
    if len(wrong) == 0:
        return
    first, count = int(wrong[0]), len(wrong)
    where = "before" if first < begin else "behind" if first >= end else "inside"
    raise AssertionError(f"{name}: {count} bytes written {where} it, first {first - begin}")
