"""Decode steps on the CPU as recorded calls: what a CUDA graph is on a GPU.

The first step of some number of rows runs op by op while the core's calls are written down; the
next ones copy what changes (the embedded tokens, positions, first visible positions) to where those
calls read it, and make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mistral_kernels.model.module_state import ModuleState, others_take_part
from mistral_kernels.model.rope_tables import RopeTables
from mistral_kernels.model.step import ALL, DecodeRows, Step
from mistral_kernels.ops.checks import compute_dtype
from mistral_kernels.ops.recorded_calls import NotRecordableError, RecordedCalls
from mistral_kernels.ops.watched import watched

if TYPE_CHECKING:
    from mistral_kernels.model.cache import LayerCache
    from mistral_kernels.model.transformer import Transformer

# A step from embedded tokens to logits, both (rows, ...).
Compute = Callable[[Tensor, Step], Tensor]
# Numbers of rows whose steps are kept. Each keeps what all layers computed, of Mistral 7B in
# bfloat16 5 MB a row: all those from 1 to 48, as sequences end one by one, would keep 6 GB.
KEPT = 8


class StepRecordings:
    """The recorded steps of one cache, by their number of rows; the last used come last."""

    def __init__(self) -> None:
        self._steps: dict[int, _RecordedStep] = {}

    def run(
        self,
        model: Transformer,
        x: Tensor,
        step: Step,
        tables: RopeTables,
        layers: Sequence[LayerCache],
        compute: Compute,
    ) -> Tensor:
        """What `compute(x, step)` returns, by the recording of such a step where one holds.

        Args:
            x: (rows, hidden), embedded tokens.
            tables, layers: what `compute` reads besides.

        Returns:
            (rows, vocab), the caller's to keep; from a recording in `compute_dtype`.
        """
        decode = step.decode if step.prefill is None else None  # None too where nobody feeds
        one_each = decode is not None and decode.rows is decode.sequences is ALL
        if x.device.type != "cpu" or not one_each or watched(x):
            return compute(x, step)
        recorded = self._steps.pop(len(x), None)
        if recorded is not None and recorded.holds(model, tables, layers):
            recorded.replay(x, step.decode)
        elif others_take_part(model):
            return compute(x, step)
        else:
            while len(self._steps) >= KEPT:
                del self._steps[next(iter(self._steps))]
            recorded = _RecordedStep(model, x, step, tables, layers, compute)
        self._steps[len(x)] = recorded
        if recorded.calls is None:
            return compute(x, step)
        logits = recorded.calls.result
        return logits.to(compute_dtype(logits.dtype), copy=True)  # the next step writes over it


class _RecordedStep:
    """The calls of a step, None where they cannot be recorded, and what they were recorded for."""

    def __init__(
        self,
        model: Transformer,
        x: Tensor,
        step: Step,
        tables: RopeTables,
        layers: Sequence[LayerCache],
        compute: Compute,
    ):
        self._model, self._tables, self._layers = model, tables, [*layers]
        self._kernels = [*model.kernels.values()]
        # A tensor made in inference mode could not be written outside.
        with torch.inference_mode(False), torch.no_grad():
            self._x = x.clone()
            self._positions = step.decode.positions.clone()
            self._starts = torch.zeros_like(self._positions)
            self._load(x, step.decode)
            rows = DecodeRows(ALL, ALL, self._positions, self._starts)
            own = Step(ALL, rows, None, self._positions)
            try:
                self.calls = RecordedCalls(lambda: compute(self._x, own))
            except NotRecordableError:  # a backend, a dtype or so many rows as torch computes
                self.calls = None
            self._state = ModuleState(model)

    def holds(self, model: Transformer, tables: RopeTables, layers: Sequence[LayerCache]) -> bool:
        """Whether the calls, or that there are none, are still those of the model's step."""
        return (
            model is self._model
            and tables is self._tables
            and all(map(is_, layers, self._layers))
            and [*model.kernels.values()] == self._kernels
            and (self.calls is None or self.calls.current())
            and self._state.unchanged()
        )

    def replay(self, x: Tensor, rows: DecodeRows) -> None:
        """Makes the calls again, if there are any, for other tokens."""
        if self.calls is not None:
            self._load(x, rows)
            self.calls.replay()

    def _load(self, x: Tensor, rows: DecodeRows) -> None:
        self._x.copy_(x)
        self._positions.copy_(rows.positions)
        if rows.starts is None:
            self._starts.zero_()
        else:
            self._starts.copy_(rows.starts)
