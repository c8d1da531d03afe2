"""The memory that a call takes beyond its inputs: outputs and scratch together, on Linux."""

import re
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # to clear_refs: VmHWM starts again at VmRSS


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Return the growth of this process's resident memory at its peak during `call`.

    None where the kernel does not tell. Blocks of the C library's heap that are resident before the
    call are not seen again, but torch takes large tensors from fresh pages.
    """
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:  # no Linux, or a sandbox
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1])
