"""Where and of what a benchmark's results were made; no name of a host or a person."""

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mistral_kernels.info import instruction_set, version

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Return processor, GPU, versions, commit, date and command, as json can write them."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": command(sys.argv),
    }


def cpu_name() -> str:
    """Return the processor's name; Linux alone has it in a file."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", file.read_text(), re.M) if file.exists() else []
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """Return the short hash, "-dirty" behind it if files differ; None outside a repository."""
    shown = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return shown.stdout.strip() or None


def command(argv: list[str]) -> str:
    """Return the command line with `argv[0]`, a path of this machine, as the tool's name."""
    script = Path(argv[0])
    ours = script.parent == ROOT / "benchmarks"
    tool = ["python", "-m", f"benchmarks.{script.stem}"] if ours else ["pytest"]
    return shlex.join([*tool, *argv[1:]])
