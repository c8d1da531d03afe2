"""How much memory this machine has to spare: its main memory, and that of each GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a container; elsewhere without memory.max


def free_memory() -> dict[str, int | None]:
    """Tells the free bytes of each device.

    Returns:
        "cpu", then "cuda:0" and so on -> bytes. Of the main memory those that programs can get
        without swapping, within a container's limit; where the system does not tell (macOS), all
        there are; None if not even that (Windows).
    """
    found = {"cpu": _main_memory(MEMINFO, CGROUP)}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = torch.cuda.mem_get_info(index)[0]
    return found


def _main_memory(meminfo: Path, cgroup: Path) -> int | None:
    if meminfo.is_file():
        available = int(re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M)[1])
        return min([available * 1024, *_left_in_container(cgroup)])
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _left_in_container(cgroup: Path) -> list[int]:
    """What a container's limit leaves, or nothing where there is none. Cached files are free."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        match = re.search(r"^anon (\d+)", (cgroup / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # no cgroup, or "max"
        return []
    return [limit - int(match[1])] if match else []
