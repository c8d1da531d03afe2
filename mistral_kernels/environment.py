"""Where and with what a measurement was made; no name of a host or a person."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import mistral_kernels
from mistral_kernels.info import instruction_set, version


def environment() -> dict[str, Any]:
    """Return processor, GPU, versions and date, as json can write them."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "mistral_kernels": mistral_kernels.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """Return the processor's name; Linux alone has it in a file."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", file.read_text(), re.M) if file.exists() else []
    return names[0] if names else platform.machine()
