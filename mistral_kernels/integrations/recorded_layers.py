"""Layers of transformers on the CPU whose calls of kernels are recorded: later tokens replay them.

A recording belongs to one ring and one layer, and holds while neither has changed: the same memory,
the same modules with the same parameters and nobody between them. It takes what a step gives all
layers (rotation, positions, first visible tokens) from tensors that all recordings of a cache
share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mistral_kernels.integrations.attention_plan import AttentionPlan
from mistral_kernels.integrations.rolling_cache import RollingCache
from mistral_kernels.integrations.rolling_layer import RollingLayer
from mistral_kernels.integrations.transformers_forwards import Rotation
from mistral_kernels.model.module_state import ModuleState
from mistral_kernels.ops.recorded_calls import NotRecordableError, RecordedCalls

Compute = Callable[[Tensor, Rotation, AttentionPlan], Tensor]


class LayerStep(NamedTuple):
    """What a step of one token a sequence gives to a layer."""

    x: Tensor  # (batch, hidden)
    rotation: Rotation
    plan: AttentionPlan
    window: int | None
    cache: RollingCache
    index: int  # of the layer in the cache

    @property
    def ring(self) -> RollingLayer:
        return self.cache.layers[self.index]

    def begin(self) -> None:
        """Makes room in the ring, or refuses the step as `update` would."""
        self.cache.check_step(self.index, 1)
        self.ring.expect(self.x.shape[0], self.ring.kv_heads, 1, self.ring.head_dim)


class _Shared:
    """Rotation and plan of a cache's present step, at addresses that stay."""

    def __init__(self, step: LayerStep):
        self.given = (step.rotation, step.plan)
        self.rotation = Rotation(*(x.clone() for x in step.rotation))
        self.plan = AttentionPlan(*(x.clone() for x in step.plan))

    def load(self, step: LayerStep) -> bool:
        """Takes over those of a step, once; tells whether they fit."""
        if step.rotation is self.given[0] and step.plan is self.given[1]:
            return True
        pairs = list(zip((*self.rotation, *self.plan), (*step.rotation, *step.plan), strict=True))
        if any(mine.shape != x.shape or mine.dtype != x.dtype for mine, x in pairs):
            return False
        for mine, x in pairs:
            mine.copy_(x)
        self.given = (step.rotation, step.plan)
        return True


class _Recording:
    """A layer's calls on one ring; `calls` is None where they cannot be recorded."""

    def __init__(self, layer: nn.Module, facts: tuple, step: LayerStep, compute: Compute):
        self.layer, self.facts, self.window = layer, facts, step.window
        self.memory = _memory(step.ring)
        # A tensor made in inference mode could not be written outside.
        with torch.inference_mode(False), torch.no_grad():
            self.x, self.shared = step.x.clone(), _shared(step)
            arguments = (self.x, self.shared.rotation, self.shared.plan)
            try:
                self.calls = RecordedCalls(lambda: compute(*arguments))
            except NotRecordableError:
                self.calls = None
            else:
                self.state = ModuleState(layer)

    def is_of(self, layer: nn.Module, step: LayerStep) -> bool:
        return self.layer is layer and self.x.shape == step.x.shape

    def holds(self, facts: tuple, step: LayerStep) -> bool:
        """Whether replaying is what running the layer would be."""
        return (
            self.x.dtype == step.x.dtype
            and self.window == step.window
            and self.facts == facts
            and self.calls.current()
            and _same(self.memory, _memory(step.ring))
            and self.shared is _SHARED.get(step.cache)
            and self.state.unchanged()
            and self.shared.load(step)
        )

    def replay(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.calls.replay()
        return self.calls.result.clone()  # the next step writes over it


_RECORDINGS: WeakKeyDictionary[RollingLayer, _Recording] = WeakKeyDictionary()
_SHARED: WeakKeyDictionary[RollingCache, _Shared] = WeakKeyDictionary()
_LAST: WeakKeyDictionary[RollingLayer, tuple[Tensor, ...]] = WeakKeyDictionary()  # `_memory`


def replayed(layer: nn.Module, facts: tuple, step: LayerStep) -> Tensor | None:
    """The layer's output by its recording, (batch, hidden); None where that does not hold.

    `facts` are numbers and names that the calls depend on.
    """
    recording = _RECORDINGS.get(step.ring)
    if recording is None or recording.calls is None or not recording.is_of(layer, step):
        return None
    step.begin()
    if not recording.holds(facts, step):
        return None
    out = recording.replay(step.x)
    step.ring.advance(1)
    return out


def run_recorded(layer: nn.Module, facts: tuple, step: LayerStep, compute: Compute) -> Tensor:
    """Runs `compute` on what the step gives, and records its calls for `replayed`.

    Not on a ring that has just got other memory: beams give it some each step, and a recording
    takes two to three times as long as the step itself.
    """
    last, _LAST[step.ring] = _LAST.get(step.ring), _memory(step.ring)
    if last is not None and not _same(last, _LAST[step.ring]):
        _RECORDINGS.pop(step.ring, None)  # which holds the memory from before
        return compute(step.x, step.rotation, step.plan)
    recording = _RECORDINGS.get(step.ring)
    refused = recording and recording.calls is None and recording.is_of(layer, step)
    if step.x.device.type == "cpu" and not refused:
        recording = _RECORDINGS[step.ring] = _Recording(layer, facts, step, compute)
        if recording.calls:
            return recording.calls.result.clone()
    return compute(step.x, step.rotation, step.plan)


def _shared(step: LayerStep) -> _Shared:
    shared = _SHARED.get(step.cache)
    if shared is None or not shared.load(step):
        shared = _SHARED[step.cache] = _Shared(step)
    return shared


def _memory(ring: RollingLayer) -> tuple[Tensor, ...]:
    return ring.keys, ring.values, ring.block_table


def _same(memory: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(x is y for x, y in zip(memory, other, strict=True))
