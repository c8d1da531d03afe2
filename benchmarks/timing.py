"""How the calls of a benchmark are timed against its peers, and how their work is counted.

Ours and the peers take turns on the same inputs, so that a machine that slows down for a while
slows all of them. pytest-benchmark drives the rounds: its target is our call, and its untimed setup
times one call of each peer.
"""

import itertools
import statistics
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.device_time import REPEATS, cold_l2_s, graph_replay_s
from benchmarks.peers.packages import FAILURES, first_line
from mistral_kernels.machine_limits import Limits, seconds

OURS = "ours"
MIN_ROUNDS, MAX_ROUNDS = 5, 200
QUICK_ROUNDS = 3
BUDGET_S = 0.4  # of a benchmark, where that allows more rounds than MIN_ROUNDS
COLD_BYTES = 256 << 20  # several times any cache
MAX_SETS = 256
GPU_TURNS = 5  # in each of which a contestant makes its share of all calls
GRAPH_SETS = 8  # inputs of a graph replay
# Largest difference between two contestants, as a share of the largest value. A check that they do
# the same, not of their precision: that is the tests' business.
AGREE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}

Samples = dict[str, list[float]]  # contestant -> seconds of each round


class Work(NamedTuple):
    """What one call must do at least; masked tiles do not count."""

    bytes: int  # read and written
    flops: int
    writes: bool = False  # writes about as much as it reads: held against the copy bandwidth


def measure(
    benchmark,
    call: Callable[..., Tensor],
    make_inputs: Callable[[], tuple],
    peers: Mapping[str, Callable[..., Tensor]],
    *,
    cold: bool = False,
    compare: bool = True,
    rounds: int | None = None,
    steps: int = 1,
    fewest: int = MIN_ROUNDS,
    may_fail: Collection[str] = (),
) -> tuple[Samples, dict[str, str]]:
    """Time `call` and `peers` on the same inputs, in turns.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: our way; its inputs may be written, but the next call must cost the same.
        make_inputs: makes a fresh set of inputs on the device.
        peers: name -> another way to the same result.
        cold: the op streams weights or a cache that no earlier call left in the CPU's caches: each
            call takes the next of so many input sets that all of them exceed any cache.
        compare: refuse to time contestants that do not give the same values.
        rounds: calls of each contestant; None: as many as the budget allows.
        steps: equal steps in a call; the times are those of one step.
        fewest: rounds that there are at least; below MIN_ROUNDS, also the most of `rounds`.
        may_fail: names of peers that are left out if their first call fails.

    Returns:
        samples: seconds of each round by contestant; on a GPU device times, and one more sample
            "graph". Empty under --benchmark-disable.
        failed: name of a peer that was left out -> why.

    Raises:
        AssertionError: two contestants do not agree.
    """
    inputs = make_inputs()
    with torch.inference_mode():
        contestants = {OURS: call, **peers}
        results, failed = first_results(contestants, inputs, may_fail)
        for name in failed:
            del contestants[name]
        if compare:
            check_agreement(results, AGREE[benchmark.params["dtype"]])
        if benchmark.disabled:
            benchmark.pedantic(call, inputs)
            return {}, failed
        if any(isinstance(value, Tensor) and value.is_cuda for value in inputs):
            return _on_gpu(benchmark, contestants, make_inputs, inputs), failed
        sets = [inputs, *_more_sets(make_inputs, inputs)] if cold else [inputs]
        if rounds is not None and fewest < MIN_ROUNDS:
            rounds = min(rounds, fewest)
        samples = _by_the_clock(benchmark, contestants, sets, rounds, fewest)
    return {name: [time / steps for time in times] for name, times in samples.items()}, failed


def first_results(
    contestants: Mapping[str, Callable], inputs: tuple, may_fail: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Call each contestant once, untimed: a first call may compile, or make tables.

    Returns:
        results: name -> what it computed.
        failed: name of `may_fail` -> why it has no result.
    """
    results, failed = {}, {}
    for name, run in contestants.items():
        copies = (value.clone() if isinstance(value, Tensor) else value for value in inputs)
        try:
            results[name] = run(*copies).flatten().float().cpu()
        except FAILURES as error:
            if name not in may_fail:
                raise
            failed[name] = f"failed: {first_line(error)}"
    return results, failed


def check_agreement(results: Mapping[str, Tensor], share: float) -> None:
    """Raise an AssertionError if a result is off by more than `share` of our largest value."""
    ours = results[OURS]
    size = ours.abs().max()
    for name, theirs in results.items():
        gap = (ours - theirs).abs().max()
        assert gap <= share * size, f"{name} is off by {gap} where values reach {size}"


def _more_sets(make_inputs: Callable[[], tuple], inputs: tuple) -> list[tuple]:
    size = sum(value.nbytes for value in tree_leaves(inputs) if isinstance(value, Tensor))
    return [make_inputs() for _ in range(min(MAX_SETS, COLD_BYTES // size))]


def _by_the_clock(benchmark, contestants, sets, rounds: int | None, fewest: int) -> Samples:
    inputs = itertools.cycle(sets)
    if rounds is None:
        round_s = sum(seconds(run, *next(inputs)) for run in contestants.values())
        rounds = max(fewest, min(MAX_ROUNDS, int(BUDGET_S / round_s)))
    samples: Samples = {name: [] for name in contestants}

    def time_one(name: str) -> None:
        samples[name].append(seconds(contestants[name], *next(inputs)))

    def time_peers() -> None:
        for name in contestants:
            if name != OURS:
                time_one(name)

    benchmark.pedantic(time_one, (OURS,), setup=time_peers, rounds=rounds)
    return samples


def _on_gpu(benchmark, contestants, make_inputs, inputs) -> Samples:
    benchmark.pedantic(seconds, (contestants[OURS], *inputs), rounds=MIN_ROUNDS)
    samples: Samples = {name: [] for name in contestants}
    for _ in range(GPU_TURNS):
        for name, run in contestants.items():
            samples[name] += cold_l2_s(run, inputs, REPEATS // GPU_TURNS)
    # The reference and some peers wait for the GPU, which a graph cannot hold.
    if benchmark.params["backend"] in ("triton", "cuda"):
        sets = [make_inputs() for _ in range(GRAPH_SETS)]
        samples["graph"] = graph_replay_s(contestants[OURS], sets)
    return samples


def summary(samples: Samples, work: Work, limits: Limits) -> dict[str, Any]:
    """Return the columns of a row: median and quartiles of each contestant, and what they mean.

    `gb_s` and `gflop_s` are rates of useful work. `limit` names the bound that allows least: "read"
    or "copy" bandwidth, or "matmul"; `limit_fraction` is that bound's time over ours, above 1 where
    the inputs lie in a cache. `peers` holds the same times of each peer, and `ratio` its time over
    ours.
    """
    times = {name: _quartiles(values) for name, values in samples.items()}
    ours = times.pop(OURS)
    bandwidth = "copy" if work.writes else "read"
    bounds_s = {
        bandwidth: work.bytes / getattr(limits, f"{bandwidth}_gb_s") / 1e9,
        "matmul": work.flops / limits.matmul_gflop_s / 1e9,
    }
    limit = max(bounds_s, key=bounds_s.__getitem__)
    median_s = ours["median_us"] / 1e6
    return {
        **ours,
        "rounds": len(samples[OURS]),
        "gb_s": _short(work.bytes / median_s / 1e9),
        "gflop_s": _short(work.flops / median_s / 1e9),
        "limit": limit,
        "limit_fraction": _short(bounds_s[limit] / median_s),
        "peers": {
            name: time | {"ratio": _short(time["median_us"] / ours["median_us"])}
            for name, time in times.items()
        },
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median_us": _short(1e6 * median), "q1_us": _short(1e6 * q1), "q3_us": _short(1e6 * q3)}


def _short(number: float) -> float:
    """Four digits: more would be noise, and make the committed files longer."""
    return float(f"{number:.4g}")
