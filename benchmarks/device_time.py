"""Device times of single calls on a GPU: by CUDA events with a cold L2, and by graph replay.

Wall time of a short call mostly shows what its launch costs the host.
"""

from collections.abc import Callable

import torch

REPEATS = 50
FLUSH_BYTES = 256 << 20  # several times any L2


def cold_l2_s(run: Callable, inputs: tuple, repeats: int = REPEATS) -> list[float]:
    """Return device times of single calls, each after the L2 was overwritten."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(*inputs)
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def graph_replay_s(run: Callable, sets: list[tuple]) -> list[float]:
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
        times.append(begin.elapsed_time(end) / 1e3 / len(sets))
    return times
