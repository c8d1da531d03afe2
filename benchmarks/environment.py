"""Of what code and by which command a benchmark's results were made, and where."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mistral_kernels import environment as machine

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Return facts of the machine, code and command, as json can write them."""
    made = {"commit": commit(), "code": code(), "command": command(sys.argv)}
    return machine.environment() | made


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


def code() -> str:
    """Return a digest of all that runs: Python files and the compiled core, committed or not."""
    digest = hashlib.sha256()
    for root in (Path(machine.__file__).parent, ROOT / "benchmarks"):
        files = (
            Path(folder, name)
            for folder, _, names in os.walk(root, followlinks=True)  # kernels/ is a symlink
            for name in names
            if name.endswith((".py", ".so"))
        )
        for file in sorted(files):
            digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def command(argv: list[str]) -> str:
    """Return the command line with `argv[0]`, a path of this machine, as the tool's name."""
    script = Path(argv[0])
    ours = script.parent == ROOT / "benchmarks"
    tool = ["python", "-m", f"benchmarks.{script.stem}"] if ours else ["pytest"]
    return shlex.join([*tool, *argv[1:]])
