"""The decode step: one token for each of some sequences, sampling included, over static tensors.

Nothing that a step computes or reads depends on how long its sequences are, and all that changes
from one step to the next lies in a `StepBuffer`. So on a GPU a step is captured in a CUDA graph and
replayed; on the CPU the same function runs, whose model replays recorded calls. A step leaves its
tokens and positions as the next one wants them: as long as the same sequences go on greedily,
nothing is copied in.

On a GPU a step has a power of two of rows, or one for each place of the cache, and those without a
sequence are idle: they write nothing and read no expert. Five sequences in a cache of 12, and 9:

>>> step_rows(5, 12, "cuda"), step_rows(9, 12, "cuda"), step_rows(5, 12, "cpu")
(8, 12, 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.cache import KVCache, LayerCache
from mistral_kernels.model.forward_checks import check_cache
from mistral_kernels.model.rope_tables import RopeTables
from mistral_kernels.model.sampling import Sampling, logprobs_of, sample
from mistral_kernels.model.step import ALL, DecodeRows, Step
from mistral_kernels.model.step_buffer import IDLE_ROW, Row, StepBuffer
from mistral_kernels.model.step_graphs import CapturedGraph, StepGraphs
from mistral_kernels.ops.checks import compute_dtype

if TYPE_CHECKING:
    from mistral_kernels.model.transformer import Transformer


class Fed(NamedTuple):
    """One token of one sequence."""

    place: int  # of the cache
    token: int
    draw: float  # in [0, 1), what the next token is sampled with; 0 where that is greedy


def decode(
    model: Transformer, cache: KVCache, fed: Sequence[Fed], sampling: Sampling
) -> tuple[list[int], list[float]]:
    """Feeds one token to each of some sequences and draws their next ones.

    The steps that are made for it stay with the cache, for the next call. They are made anew once
    they do not fit any more: for other rotary tables, other tensors of the cache, another sampling.

    Args:
        fed: at most one token a place, in the order of places.

    Returns:
        tokens, logprobs: of each entry of `fed`; the latter under the unscaled distribution.

    Raises:
        ValueError: the cache is of another model, or a sequence outgrows it; it is as before then.
    """
    check_cache(cache, model, "generate")
    seqlens = [0] * cache.batch
    for row in fed:
        seqlens[row.place] = 1
    cache.check_room(seqlens)
    tables = model.rope_tables(cache.max_tokens)
    steps = cache.decode_steps
    if steps is None or not steps.fit(cache, tables, sampling):
        steps = cache.decode_steps = DecodeSteps(model, cache, tables, sampling)
    cache.begin(seqlens)
    with torch.inference_mode():
        drawn = steps.run(model, cache, fed)
    cache.advance(seqlens)
    return drawn


def step_rows(sequences: int, batch: int, device_type: str) -> int:
    """Rows of the step in which so many sequences of a cache with `batch` places go on.

    On the CPU an idle row costs time, and there is no graph that it could save.
    """
    return sequences if device_type == "cpu" else min(1 << (sequences - 1).bit_length(), batch)


class DecodeSteps:
    """The steps of one cache, by their number of rows, and what they were made for.

    Graphs are kept for one sampling at a time and share one pool of memory, so that all together
    take about as much as the largest.
    """

    def __init__(self, model: Transformer, cache: KVCache, tables: RopeTables, sampling: Sampling):
        self._layers, self._tables, self._sampling = [*cache.layers], tables, sampling
        self._steps: dict[int, DecodeStep] = {}
        self._graphs: StepGraphs | None = None

    def fit(self, cache: KVCache, tables: RopeTables, sampling: Sampling) -> bool:
        """Whether these steps read the tensors that they would if they were made now."""
        same = tables is self._tables and sampling == self._sampling
        return same and all(a is b for a, b in zip(cache.layers, self._layers, strict=True))

    def run(
        self, model: Transformer, cache: KVCache, fed: Sequence[Fed]
    ) -> tuple[list[int], list[float]]:
        """One step; the order of `fed` is that of the results."""
        rows = step_rows(len(fed), cache.batch, model.device.type)
        step = self._steps.get(rows)
        if step is None:
            step = self._steps[rows] = DecodeStep(
                model, cache, self._layers, self._tables, self._sampling, rows
            )
        lengths, starts = cache.lengths, cache.starts
        given = [Row(draw, at, starts[at], lengths[at], token) for at, token, draw in fed]
        if rows == cache.batch:  # row i is place i, whose pages need no gathering
            where = [row.place for row in given]
            padded = [IDLE_ROW] * rows
            for row in given:
                padded[row.place] = row
        else:
            where = range(len(given))
            padded = given + [IDLE_ROW] * (rows - len(given))
        step.buffer.feed(padded)
        self._launch(model, cache, step)
        tokens, logprobs = step.buffer.drawn()
        return [tokens[i] for i in where], [logprobs[i] for i in where]

    def _launch(self, model: Transformer, cache: KVCache, step: DecodeStep) -> None:
        """Replays the step's graph, or where there is none calls `compute`."""
        if self._graphs is None or not self._graphs.fit(model):
            for stale in self._steps.values():
                stale.graph, stale.warm = None, False
            self._graphs = StepGraphs(model, cache)
        if step.graph is not None:
            step.graph.replay()
            return
        step.compute(model)
        if step.warm and self._graphs.refusal is None:  # one step alone is not worth a capture
            step.graph = self._graphs.capture(lambda: step.compute(model))
        step.warm = True


class DecodeStep:
    """A step with a fixed number of rows, over static tensors.

    Attributes:
        buffer: what is fed and drawn.
        graph: the captured step; None before that, and where there is none.
        warm: whether it has run before.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        layers: Sequence[LayerCache],
        tables: RopeTables,
        sampling: Sampling,
        rows: int,
    ):
        self.buffer = StepBuffer(rows, compute_dtype(model.dtype), model.device)
        self.graph: CapturedGraph | None = None
        self.warm = False
        self._tables, self._sampling = tables, sampling
        self._recordings = cache.recordings
        at = self.buffer.on_device
        self._step = Step(ALL, DecodeRows(ALL, ALL, at.positions, at.starts), None, at.positions)
        # id of a block table -> it, and its rows of this step's sequences. Layers share tables.
        self._pages: dict[int, tuple[Tensor, Tensor]] = {}
        if rows != cache.batch:
            for table in (layer.block_table for layer in layers):
                self._pages[id(table)] = table, table.new_zeros(rows, table.shape[1])
            layers = [
                layer._replace(block_table=self._pages[id(layer.block_table)][1])
                for layer in layers
            ]
        self._layers = layers

    def compute(self, model: Transformer) -> None:
        """The device's part: from the buffer's inputs to its outputs, which are the next inputs."""
        at = self.buffer.on_device
        for table, pages in self._pages.values():
            torch.index_select(table, 0, at.places, out=pages)
        how = {"last_only": True, "recordings": self._recordings}
        logits = model.run(at.tokens, self._step, self._tables, self._layers, **how)
        tokens = sample(logits, at.draws, **self._sampling._asdict())
        at.logprobs.copy_(logprobs_of(logits, tokens))
        at.tokens.copy_(tokens)
        at.positions.add_(at.positions >= 0)
