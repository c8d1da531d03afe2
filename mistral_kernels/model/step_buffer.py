"""What a decode step is fed and what it draws, as rows of one static buffer on the device.

The inputs lie side by side and so do the outputs, so that each go in one copy; the tokens belong to
both: a step writes those it draws where the next one reads.

    draws | places | starts | positions | tokens | logprobs
    ---------------- inputs -------------------
                                          -- outputs ------
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IDLE = -1  # the position of a row that feeds nothing


class Row(NamedTuple):
    """What one row of a step is fed."""

    draw: float  # in [0, 1), what a token is sampled with
    place: int  # of the cache
    start: int  # first position that it may see
    position: int  # of the token
    token: int


# It names a place, as every row must, but with its position nothing is read or written there.
IDLE_ROW = Row(0.0, 0, 0, IDLE, 0)


class Fields(NamedTuple):
    """The parts of a buffer, each (rows,)."""

    draws: Tensor  # float64, first: what is wider than 4 bytes begins at a multiple of 8
    places: Tensor  # int32, and so are the next three
    starts: Tensor
    positions: Tensor
    tokens: Tensor
    logprobs: Tensor  # float32 (float64 for a float64 model)


class StepBuffer:
    """The buffer of steps with `rows` rows on `device`, and its pinned twin on the host.

    Args:
        rows: of a step.
        dtype: of logprobs.
        device: where; on the CPU the buffer is its own twin.

    Attributes:
        on_device: the fields, for the step to read and write.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device):
        self._inputs = rows * 24
        self._outputs = slice(rows * 20, rows * (24 + dtype.itemsize))
        self._device = torch.zeros(self._outputs.stop, dtype=torch.uint8, device=device)
        self._host, self._done = self._device, None
        if device.type == "cuda":
            self._host = torch.zeros(
                self._outputs.stop, dtype=torch.uint8, device="cpu", pin_memory=True
            )
            self._done = torch.cuda.Event()
        self.on_device = _fields(self._device, rows, dtype)
        host = _fields(self._host, rows, dtype)
        self._fed = [field.numpy() for field in host[: len(Row._fields)]]
        self._drawn = host.tokens, host.logprobs
        self._held: list[Row] | None = None  # what the device's inputs are, if that is known
        self._under_way = False  # a step whose outputs nobody has waited for

    def feed(self, rows: list[Row]) -> None:
        """Makes `rows` the inputs: one copy, or none where the device has them already."""
        known, self._held = self._held, None  # a step that is interrupted leaves them unknown
        if self._under_way and self._done is not None:
            # Interrupted: the host's twin must not change before the device has read it.
            torch.cuda.current_stream(self._device.device).synchronize()
        self._next, self._under_way = rows, True
        if rows == known:
            return
        for field, values in zip(self._fed, zip(*rows, strict=True), strict=True):
            field[:] = values
        if self._host is not self._device:
            self._device[: self._inputs].copy_(self._host[: self._inputs], non_blocking=True)

    def drawn(self) -> tuple[list[int], list[float]]:
        """Waits for the step; returns the tokens that it drew and their logprobs."""
        if self._done is not None:
            self._host[self._outputs].copy_(self._device[self._outputs], non_blocking=True)
            self._done.record(torch.cuda.current_stream(self._device.device))
            self._done.synchronize()
        self._under_way = False
        tokens, logprobs = (field.tolist() for field in self._drawn)
        # What an idle row draws is nothing that the next step would have to replace.
        self._held = [
            row if row.position < 0 else Row(*row[:3], row.position + 1, token)
            for row, token in zip(self._next, tokens, strict=True)
        ]
        return tokens, logprobs


def _fields(buffer: Tensor, rows: int, dtype: torch.dtype) -> Fields:
    draws, integers, logprobs = buffer.split((8 * rows, 16 * rows, dtype.itemsize * rows))
    integers = integers.view(torch.int32).view(4, rows)
    return Fields(draws.view(torch.float64), *integers.unbind(), logprobs.view(dtype))
