"""How fast a model generates, measured through `mistral_kernels.stream`, which is what users run.

A run feeds `batch` prompts to an empty cache and draws `new` tokens of each. Its first tokens end
the prefill, and each later round of tokens is a step of decode:

    time    0 ......... t[0] . t[1] . t[2] .. t[new - 1]
            prefill          decode, new - 1 steps

All runs take one cache, with which the recorded calls or CUDA graphs of its steps stay.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from mistral_kernels.machine_limits import Limits
from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.generate import stream
from mistral_kernels.model.step_work import StepWork, step_work
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.peak_memory import device_peak_bytes

# New tokens of the run before the timed ones: what is compiled, recorded or captured is so there.
WARM_UP = 8


class Load(NamedTuple):
    """What a model is given to do."""

    batch: int  # sequences at once, >= 1
    prompt: int  # tokens of each, >= 1
    new: int  # tokens drawn after each, >= 2

    @property
    def tokens(self) -> int:
        """Most tokens of a sequence."""
        return self.prompt + self.new


def steps_of(load: Load, repeats: int) -> int:
    """How often `measure_speed` calls `advance`."""
    return min(WARM_UP, load.new) + repeats * load.new


def measure_speed(
    model: Transformer,
    load: Load,
    limits: Limits,
    *,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure prefill and decode: greedy, of random token ids, no sequence ends early.

    Args:
        model: the model.
        load: what it does in each run.
        limits: of the device, which the work of the steps is held against.
        repeats: timed runs, >= 1.
        advance: called after each round of tokens.

    Returns:
        A dictionary that json can write:
        prefill: tokens and seconds of a run, the median of all, and tokens_per_s;
        time_to_first_token_ms: until every sequence has its first token, the median of the runs;
        decode: the same as prefill, of the tokens after the first ones;
        inter_token_ms: median and p99 over the steps of all runs;
        peak_memory_bytes: see `device_peak_bytes`.
        prefill and decode also have bandwidth_fraction and matmul_fraction: the bytes and the
        operations that they need at least (`step_work`) over what the limits allow in that time;
        above 1 where what is read lies in a cache.

    Raises:
        RuntimeError: logits are not finite, or memory runs out.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab, (load.batch, load.prompt), generator=generator)
    prompts = ids.tolist()
    runs: list[list[float]] = []

    def measure() -> None:
        cache = model.new_cache(load.batch, load.tokens)
        _step_ends(prompts, model, cache, min(WARM_UP, load.new), advance)
        runs.extend(_step_ends(prompts, model, cache, load.new, advance) for _ in range(repeats))

    peak = device_peak_bytes(measure, model.device)
    steps = load.new - 1
    first_s = statistics.median(ends[0] for ends in runs)
    decode_s = statistics.median(ends[-1] - ends[0] for ends in runs)
    between_s = [after - before for ends in runs for before, after in itertools.pairwise(ends)]
    how = {"dtype": model.dtype, "low_bit": model.low_bit, "batch": load.batch}
    prefill = step_work(model.config, context=0, tokens=load.prompt, **how)
    # Of the middle one of the decode steps, which begin with prompt .. prompt + steps - 1 tokens.
    step = step_work(model.config, context=load.prompt + (steps - 1) // 2, **how)
    return {
        "prefill": _phase(load.batch * load.prompt, first_s, prefill, 1, limits),
        "time_to_first_token_ms": 1e3 * first_s,
        "decode": _phase(load.batch * steps, decode_s, step, steps, limits),
        "inter_token_ms": {
            "median": 1e3 * statistics.median(between_s),
            "p99": 1e3 * float(np.percentile(between_s, 99, method="inverted_cdf")),
        },
        "peak_memory_bytes": peak,
    }


def _step_ends(
    prompts: list[list[int]],
    model: Transformer,
    cache: KVCache,
    new: int,
    advance: Callable[[], None],
) -> list[float]:
    """Seconds from the start of a run until every sequence has its first token, its second, .."""
    arrivals: list[list[float]] = [[] for _ in prompts]
    cache.reset()
    begin = time.perf_counter()
    for sequence, _, _ in stream(prompts, model, max_tokens=new, cache=cache):
        arrivals[sequence].append(time.perf_counter() - begin)
        if sequence == 0:
            advance()
    return [max(times) for times in zip(*arrivals, strict=True)]


def _phase(
    tokens: int, seconds: float, work: StepWork, steps: int, limits: Limits
) -> dict[str, float]:
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "bandwidth_fraction": steps * work.bytes / (1e9 * limits.read_gb_s) / seconds,
        "matmul_fraction": steps * work.flops / (1e9 * limits.matmul_gflop_s) / seconds,
    }
