"""What this machine can do at most: the rates that every row of a benchmark is held against.

Measured in the same run as the rows, by torch alone. On the CPU torch.mv over far more memory than
the caches hold comes within 3 % of a streaming loop in C (21.4 of 22.0 GB/s on two cores of a Xeon
at 2.5 GHz, 2026-11-22); torch.sum reads 5 to 15 % less there. The best of both counts.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

STREAM_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
MATMUL = {"cpu": (2048, torch.float32), "cuda": (8192, torch.bfloat16)}  # size, dtype
REPEATS = 5


class Limits(NamedTuple):
    """Rates that no call of an op can pass, unless its tensors lie in a cache."""

    read_gb_s: float
    copy_gb_s: float  # bytes read and bytes written, added
    matmul_gflop_s: float


@functools.cache
def machine_limits(device: str, stream_bytes: int) -> Limits:
    """Measure the limits of a device once a process.

    Args:
        device: "cpu", all of torch's threads, or "cuda".
        stream_bytes: what is read and copied, a multiple of 64 KiB; STREAM_BYTES[device], unless
            nobody will look at the result.
    """
    size, dtype = MATMUL[device]
    stream = torch.zeros(stream_bytes // 4, device=device)
    matrix, vector = stream.view(-1, 1 << 14), torch.zeros(1 << 14, device=device)
    target, square = torch.empty_like(stream), torch.rand(size, size, device=device).to(dtype)
    read_s = min(fastest_s(stream.sum), fastest_s(lambda: torch.mv(matrix, vector)))
    copy_s = fastest_s(lambda: target.copy_(stream))
    matmul_s = fastest_s(lambda: torch.mm(square, square))
    rates = stream.nbytes / read_s, 2 * stream.nbytes / copy_s, 2 * size**3 / matmul_s
    return Limits(*(round(rate / 1e9, 2) for rate in rates))


def fastest_s(call: Callable[[], object]) -> float:
    """Return the shortest time of a call: a limit is what was reached once."""
    return min(seconds(call) for _ in range(REPEATS + 1))  # the first may be slow


def seconds(call: Callable, *inputs) -> float:
    """Return the wall time of one call, on a GPU with the work that it started."""
    begin = time.perf_counter()
    call(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
