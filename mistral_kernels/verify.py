"""What `mistral-kernels verify` computes: one prompt through every backend, compared with float64.

The backends read two ragged sequences in chunks through the rolling cache and then token by token,
so that every attention path of the model is taken. The other side is the reference without a cache,
in float64, with one block at a time converted: a big model needs room for one such block, not for a
second model. In a low precision it takes over the experts that the judged run chose, which
`mistral_kernels.routing` judges apart. Limits are those of `mistral_kernels.tolerance`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mistral_kernels import Transformer, ops
from mistral_kernels.model.rope_tables import rope_tables
from mistral_kernels.model.step import plan_step
from mistral_kernels.ops import dispatch
from mistral_kernels.routing import Route, gap_limit, recorded, same_choices, widest_gap
from mistral_kernels.tolerance import Error, error, fp32_limit, low_precision_limit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A longer window is not filled: wrapping its ring would take minutes on a big model.
MAX_WRAPPED_WINDOW = 256
UNWRAPPED_SPAN = 48
DECODE_STEPS = 16


class Run(NamedTuple):
    """What a model made of the prompt, one row a token, sequence after sequence."""

    logits: Tensor  # (tokens, vocab)
    outputs: list[Tensor]  # of each layer, (tokens, hidden)
    routes: list[Route]  # of each layer; empty in a dense model


class Limits(NamedTuple):
    """How far the parts of a run may lie from float64."""

    logits: Error
    outputs: list[Error]  # of each layer
    gaps: list[float]  # of each layer's router, infinite in float32; empty in a dense model


@dataclass(frozen=True)
class Row:
    """The verdict on one backend.

    Attributes:
        backend: its name.
        result: "pass", "fail" or "not available".
        error, limit: of the logits, largest and mean; None if not available.
        first_layer: where a miss begins: the first layer whose output diverges or, in bf16 and
            fp16, whose router chose a wrong expert; "output" if only the logits diverge, None
            without a miss. A wrong expert is a miss even if `error` is within `limit`.
        reason: why it is not available, else None.
        ops: op -> the backend that served it; a backend that lacks an op leaves it to another.
    """

    backend: str
    result: Literal["pass", "fail", "not available"]
    error: Error | None = None
    limit: Error | None = None
    first_layer: str | None = None
    reason: str | None = None
    ops: dict[str, str] | None = None


@dataclass(frozen=True)
class Report:
    """The verdicts, and what was run: `tokens` of each sequence in `steps` forward calls.

    `wrapped_window` is the shortest window, if its ring was filled and began to overwrite itself.
    """

    folder: str
    device: str
    dtype: str
    tokens: list[int]
    steps: int
    wrapped_window: int | None
    rows: list[Row]

    @property
    def passed(self) -> bool:
        """Whether no backend missed."""
        return all(row.result != "fail" for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for json: an error is {max, mean}, an infinite one has None there."""
        report = asdict(self)
        for row in report["rows"]:
            for key in ("error", "limit"):
                if row[key] is not None:
                    row[key] = {
                        name: value if math.isfinite(value) else None
                        for name, value in row[key]._asdict().items()
                    }
        return report


def verify(
    folder: str | Path,
    *,
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
) -> Report:
    """Run a checkpoint's model with every backend and compare each with float64.

    Args:
        folder: the checkpoint.
        backend: only this one and the reference; None: all.
        dtype: of the model: float32, bfloat16 or float16.
        device: None: cuda if present, else cpu.
        allow_pickle: as for `Transformer.from_folder`.

    Returns:
        A row for every backend, also for those that cannot run here.

    Raises:
        ValueError: no such backend or dtype, or a checkpoint that cannot be read.
        FileNotFoundError: no such checkpoint.
    """
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"verify: backend must be one of {dispatch.BACKENDS}, got {backend!r}")
    if dtype not in DTYPES:
        raise ValueError(f"verify: dtype must be one of {DTYPES}, got {dtype}")
    model = Transformer.from_folder(folder, device=device, dtype=dtype, allow_pickle=allow_pickle)
    steps, wrapped_window = plan_steps(model.config.windows)
    generator = torch.Generator("cpu").manual_seed(0)
    prompts = [
        torch.randint(model.config.vocab, (sum(counts),), generator=generator, device="cpu")
        for counts in zip(*steps, strict=True)
    ]
    names = dispatch.BACKENDS if backend is None else dict.fromkeys(("reference", backend))
    with torch.inference_mode():
        if dtype == torch.float32:
            peer, exact = None, run_exact(model, prompts)
        else:
            peer = run_whole(model, prompts)
            exact = run_exact(model, prompts, peer.routes)
        rows = [verify_backend(model, name, prompts, steps, exact, peer) for name in names]
    return Report(
        folder=str(folder),
        device=str(model.device),
        dtype=str(dtype).removeprefix("torch."),
        tokens=[len(prompt) for prompt in prompts],
        steps=len(steps),
        wrapped_window=wrapped_window,
        rows=rows,
    )


def plan_steps(windows: Sequence[int | None]) -> tuple[list[tuple[int, int]], int | None]:
    """Return how many tokens of two sequences each forward call feeds, and the window that wraps.

    The second sequence joins late, chunks are shorter and longer than the window, two calls mix a
    chunk with a single token, and the last calls are single tokens of both.

    >>> plan_steps([None, 64])[0][:5]
    [(33, 0), (33, 22), (67, 1), (1, 67), (1, 1)]
    """
    window = min((w for w in windows if w is not None), default=None)
    wraps = window is not None and window <= MAX_WRAPPED_WINDOW
    # Rings are rounded up to 16 slots, so a shorter window needs as many tokens to wrap.
    span = max(window, 16) if wraps else UNWRAPPED_SPAN
    half, third = span // 2 + 1, span // 3 + 1
    chunks = [(half, 0), (half, third), (span + 3, 1), (1, span + 3)]
    return chunks + [(1, 1)] * DECODE_STEPS, window if wraps else None


def run_exact(model: Transformer, prompts: list[Tensor], replay: Sequence[Route] = ()) -> Run:
    """Run the reference in float64 without a cache, converting one block at a time.

    With `replay`, the routes of another run's layers, tokens go to the experts that it chose.
    """
    model.set_backend("reference")
    lengths = [len(prompt) for prompt in prompts]
    tables = rope_tables(model.config, max(lengths), model.device, torch.float64)
    zeros = [0] * len(lengths)
    step = plan_step(lengths, zeros, starts=zeros, cached=False, device=model.device)
    ids = torch.cat(prompts).to(model.device)
    x, added = nn.functional.embedding(ids, model.tok_embeddings).double(), None
    outputs, norm = [], model.norm.double()
    with recorded(model, replay) as routes:
        for layer in model.layers:
            x, added = copy.deepcopy(layer).double()(x, added, step, tables)
            outputs.append(x + added)
    normed = ops.rms_norm(outputs[-1], norm, model.config.norm_eps, backend="reference")
    head = model.tok_embeddings if model.config.tied_embeddings else model.output
    return Run(ops.linear(normed, head.double(), backend="reference"), outputs, routes)


def run_whole(model: Transformer, prompts: list[Tensor]) -> Run:
    """Run the reference in the model's dtype without a cache: what torch makes of that dtype."""
    model.set_backend("reference")
    return _run(model, prompts, [tuple(len(prompt) for prompt in prompts)], cache=None)


def verify_backend(
    model: Transformer,
    backend: str,
    prompts: list[Tensor],
    steps: list[tuple[int, int]],
    exact: Run,
    peer: Run | None,
) -> Row:
    """Run the prompts step by step with one backend and judge what comes out.

    `peer` is the reference's run in a low precision, whose error sets the limits; None in float32.
    `exact` has then replayed the peer's choice of experts.
    """
    if reason := dispatch.unavailable(backend):
        return Row(backend, "not available", reason=reason)
    model.set_backend(backend)
    if backend not in model.backends.values():
        reason = f"no op of this model takes it on {model.device.type} in {model.dtype}"
        return Row(backend, "not available", reason=reason)
    cache = model.new_cache(len(prompts), max(map(len, prompts)))
    run = _run(model, prompts, steps, cache)
    served = dict(model.backends)
    limits = _fp32_limits(backend, exact) if peer is None else _low_precision_limits(peer, exact)
    if peer is not None and not same_choices(run.routes, exact.routes):
        exact = run_exact(model, prompts, run.routes)
    found = error(run.logits, exact.logits)
    first_layer = _first_miss(run, exact, limits)
    result = "pass" if first_layer is None else "fail"
    return Row(backend, result, found, limits.logits, first_layer, ops=served)


def _fp32_limits(backend: str, exact: Run) -> Limits:
    """The limit of the logits, for a layer's output scaled by its size and without a mean."""
    limit = fp32_limit(backend)
    sizes = [max(1.0, expected.abs().max().item()) for expected in exact.outputs]
    outputs = [Error(limit.max * size, math.inf) for size in sizes]
    return Limits(limit, outputs, [math.inf] * len(exact.routes))


def _low_precision_limits(peer: Run, exact: Run) -> Limits:
    """The limits that torch's errors in that dtype set, at the same choice of experts."""
    return Limits(
        low_precision_limit(error(peer.logits, exact.logits)),
        [
            low_precision_limit(error(output, expected))
            for output, expected in zip(peer.outputs, exact.outputs, strict=True)
        ],
        [gap_limit(*routes) for routes in zip(peer.routes, exact.routes, strict=True)],
    )


def _run(model: Transformer, prompts: list[Tensor], steps: Sequence[tuple], cache) -> Run:
    """Feed each step's share of the prompts, and put the results into the order of the prompts."""
    at = [0, *accumulate(map(len, prompts[:-1]))]  # each sequence's next row in `ids`
    ids, rows = torch.cat(prompts), []
    logits, outputs = [], [[] for _ in model.layers]
    with contextlib.ExitStack() as hooks, recorded(model) as calls:
        for layer, kept in zip(model.layers, outputs, strict=True):
            hook = layer.register_forward_hook(
                lambda _, args, out, kept=kept: kept.append(sum(out))
            )
            hooks.callback(hook.remove)
        for counts in steps:
            fed = torch.cat(
                [torch.arange(a, a + n, device="cpu") for a, n in zip(at, counts, strict=True)]
            )
            at = [a + n for a, n in zip(at, counts, strict=True)]
            logits.append(model.forward(ids[fed], counts, cache))
            rows.append(fed)
    order = torch.cat(rows).argsort().to(model.device)
    # A dense model has no routes; else each step calls the routers of all layers in turn.
    of_layers = [calls[n :: len(outputs)] for n in range(len(outputs))] if calls else []
    routes = [
        Route(*(torch.cat(parts)[order] for parts in zip(*of_layer, strict=True)))
        for of_layer in of_layers
    ]
    return Run(torch.cat(logits)[order], [torch.cat(kept)[order] for kept in outputs], routes)


def _first_miss(run: Run, exact: Run, limits: Limits) -> str | None:
    """Name the first layer that misses its limits, or "output" if only the logits do.

    Nothing is a miss, None, if the logits are within theirs and no router chose a wrong expert.
    """
    misrouted = {
        n
        for n, (route, gap) in enumerate(zip(exact.routes, limits.gaps, strict=True))
        if widest_gap(route) > gap
    }
    if error(run.logits, exact.logits).within(limits.logits) and not misrouted:
        return None
    for n, (output, expected) in enumerate(zip(run.outputs, exact.outputs, strict=True)):
        if n in misrouted or not error(output, expected).within(limits.outputs[n]):
            return str(n)
    return "output"
