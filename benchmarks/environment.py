"""Of what commit and by which command a benchmark's results were made, and where."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mistral_kernels import environment as machine

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Return facts of the machine, commit and command, as json can write them."""
    return machine.environment() | {"commit": commit(), "command": command(sys.argv)}


def commit() -> str | None:
    """Return the short hash, "-dirty" behind it if files differ; None outside a repository, or
    without git."""
    git = shutil.which("git")
    if git is None:
        return None
    shown = subprocess.run(
        [git, "describe", "--always", "--exclude=*", "--dirty"],
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
