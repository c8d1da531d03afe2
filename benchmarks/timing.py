"""What every benchmark of an op shares: who takes part, how a call is timed, how work is counted.

A benchmark runs under pytest-benchmark: `pytest benchmarks/bench_rms_norm.py`. Its median is wall
time of one call on warm inputs. On a GPU that mostly shows launch overhead, so the device time is
added to `extra_info`: by CUDA events with a cold L2, and by replay of a graph over inputs in turn.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from mistral_kernels.ops import dispatch

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
REPEATS = 50
INPUT_SETS = 8  # of a graph replay, so that small inputs do not stay in L2
FLUSH_BYTES = 256 << 20  # several times any L2


class Work(NamedTuple):
    """Bytes that a call must move and operations that it must do; masked tiles do not count."""

    bytes: int
    flops: int


def contestants(op: str, device: str) -> list[str]:
    """Return the backends that can serve `op` on `device` here, and "torch", the peer."""
    call = {"device_type": device, "dtype": DTYPES[device], "capability": None}
    if device == "cuda":
        call["capability"] = torch.cuda.get_device_capability()
    served = [
        name for name in dispatch.backends(op) if dispatch.prefer(op, backend=name, **call) == name
    ]
    return [*served, "torch"]


def grid(op: str, shapes: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    """Parametrise a benchmark with (device, backend, shape).

    Args:
        op: a registered op.
        shapes: device -> name -> shape. The devices that are absent here are left out.
    """
    params = [
        pytest.param(device, backend, shape, id=f"{device}-{name}-{backend}")
        for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
        for name, shape in shapes[device].items()
        for backend in contestants(op, device)
    ]
    return pytest.mark.parametrize(("device", "backend", "shape"), params)


def measure(benchmark, run: Callable, make_inputs: Callable[[], tuple], work: Work) -> None:
    """Time `run(*make_inputs())` and note work, rates and device times.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: one call; its inputs may be written, but the next call must cost the same.
        make_inputs: makes a fresh set of inputs on the device.
        work: useful work of one call.
    """
    inputs = make_inputs()
    on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)

    def call() -> None:
        run(*inputs)
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.extra_info.update(work._asdict())
    with torch.inference_mode():
        call()  # a first call may compile
        benchmark(call)
        if on_gpu:
            if benchmark.disabled:
                return
            note(benchmark, "cold_l2", cold_l2_us(run, inputs), work)
            # The reference and some peers wait for the GPU, which a graph cannot hold.
            if benchmark.params["backend"] in ("triton", "cuda"):
                sets = [make_inputs() for _ in range(INPUT_SETS)]
                note(benchmark, "graph", graph_replay_us(run, sets), work)
        elif not benchmark.disabled:
            times = [1e6 * seconds for seconds in benchmark.stats.stats.data]
            note(benchmark, "wall", times, work)


def note(benchmark, name: str, times_us: list[float], work: Work) -> None:
    """Add median, quartiles and rates of one way of timing to the benchmark's extra_info."""
    if len(times_us) < 2:  # quartiles need two
        times_us = times_us * 2
    q1, median, q3 = statistics.quantiles(times_us, n=4, method="inclusive")
    benchmark.extra_info.update(
        {
            f"{name}_us": median,
            f"{name}_q1_us": q1,
            f"{name}_q3_us": q3,
            f"{name}_gb_s": work.bytes / median / 1e3,
            f"{name}_tflops": work.flops / median / 1e6,
        }
    )


def cold_l2_us(run: Callable, inputs: tuple) -> list[float]:
    """Return device times of single calls, each after the L2 was overwritten."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(*inputs)
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in pairs]


def graph_replay_us(run: Callable, sets: list[tuple]) -> list[float]:
    """Return device times of one call each, from replays of a graph of calls on all input sets."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is made at a first call must not be captured
        for inputs in sets:
            run(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            run(*inputs)
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(sets))
    return times
