"""Decode steps on the CPU as recorded calls: what a CUDA graph is on a GPU.

The first step of some number of rows runs op by op while the core's calls are written down; the
next ones copy what changes (the embedded tokens, positions, first visible positions) to where those
calls read it, and make them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from mistral_kernels.model.module_state import ModuleState
from mistral_kernels.model.rope_tables import RopeTables
from mistral_kernels.model.step import ALL, DecodeRows, Step
from mistral_kernels.ops.dispatch import BoundOp
from mistral_kernels.ops.recorded_calls import NotRecordableError, RecordedCalls
from mistral_kernels.ops.watched import watched

if TYPE_CHECKING:
    from mistral_kernels.model.cache import LayerCache
    from mistral_kernels.model.transformer import Transformer

# A step from embedded tokens to logits, both (rows, ...).
Compute = Callable[[Tensor, Step], Tensor]


class StepRecordings:
    """The recorded steps of one cache, by their number of rows."""

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
            (rows, vocab), which the next step may write over.
        """
        one_each = step.prefill is None and step.decode.rows is step.decode.sequences is ALL
        if x.device.type != "cpu" or not len(x) or not one_each or watched(x):
            return compute(x, step)
        recorded = self._steps.get(len(x))
        if recorded is None or not recorded.holds(model, tables, layers):
            if _others_take_part(model):
                return compute(x, step)
            recorded = self._steps[len(x)] = _RecordedStep(model, x, step, tables, layers, compute)
        elif recorded.calls is not None:
            recorded.load(x, step.decode)
            recorded.calls.replay()
        return compute(x, step) if recorded.calls is None else recorded.calls.result


def _others_take_part(model: Transformer) -> bool:
    """Whether code that is not ours runs between the calls, which a replay would leave out."""
    return (
        torch_module._has_any_global_hook()
        or not ModuleState(model).unchanged()
        or any(type(op) is not BoundOp for op in model.kernels.values())
    )


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
        self._kernels, self._threads = [*model.kernels.values()], torch.get_num_threads()
        # A tensor made in inference mode could not be written outside.
        with torch.inference_mode(False), torch.no_grad():
            self._x = x.clone()
            self._positions = step.decode.positions.clone()
            self._starts = torch.zeros_like(self._positions)
            self.load(x, step.decode)
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
            and all(a is b for a, b in zip(layers, self._layers, strict=True))
            and [*model.kernels.values()] == self._kernels
            and torch.get_num_threads() == self._threads
            and not torch_module._has_any_global_hook()
            and self._state.unchanged()
        )

    def load(self, x: Tensor, rows: DecodeRows) -> None:
        self._x.copy_(x)
        self._positions.copy_(rows.positions)
        if rows.starts is None:
            self._starts.zero_()
        else:
            self._starts.copy_(rows.starts)
