"""The memory that a call takes at its peak."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CPU = torch.device("cpu")
RESET_PEAK = "5"  # to clear_refs: VmHWM starts again at VmRSS


def peak_bytes(call: Callable[[], object], device: torch.device = CPU) -> int | None:
    """Return by how much the memory of a device in use grows at its peak during `call`.

    Outputs and scratch together. On the CPU that of this process, None where the kernel does not
    tell (not Linux, or a sandbox).
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
    elif STATUS.exists():
        # What earlier calls left, in cycles of Python and in glibc's heap, would be freed or used
        # again during this one, and hide that it grows.
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        before = _resident("VmRSS")
    else:
        before = 0
    peak = device_peak_bytes(call, device)
    return None if peak is None else peak - before


def device_peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most memory of a device that is in use during `call`, weights included.

    On a GPU what torch has allocated there. On the CPU this process's resident memory, of which
    the files that it maps are a part; None where the kernel does not tell. `call` runs anyway.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        call()
        return None
    call()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1])
