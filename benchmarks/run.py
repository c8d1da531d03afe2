"""The benchmark suite: `python -m benchmarks.run --suite ops|model|all [--quick] --out DIR`.

Each bench_<name>.py runs in a pytest of its own, which adds a row to DIR/rows.jsonl as soon as it
is measured. The same command in the same DIR goes on where an earlier one was stopped, if the code
is the same. A module that fails, dies or takes too long is named at the end, the others run; so is
a peer that cannot run, or fails in its first call. Exit status: 0 if all was measured, 1 if
something of ours failed, 2 if the arguments do not fit DIR or it cannot be written, 130 if it was
stopped.

`--quick` measures the cases that a module names as `QUICK`, else its first case, three rounds at
least instead of five.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import run_folder
from benchmarks.environment import ROOT, environment
from benchmarks.peers import wanted_peers
from mistral_kernels.machine_limits import STREAM_BYTES, machine_limits
from mistral_kernels.ops import dispatch

TINY_STREAM_BYTES = 1 << 20
NOTHING_COLLECTED = 5  # pytest's exit status
STOPPED = 128 + signal.SIGINT  # as a shell has it
console = Console(stderr=True)


def modules(suite: str) -> list[Path]:
    """Return the files of a suite: "ops" are those named after an op, "model" the others."""
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    if suite == "all":
        return files
    names = {op.removesuffix("_") for op in dispatch.OPS}
    of_ops = {file: file.stem.removeprefix("bench_") in names for file in files}
    return [file for file in files if of_ops[file] == (suite == "ops")]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument("--suite", choices=("ops", "model", "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--peers", default="all", help="names with commas between, all or none")
    parser.add_argument("--device", choices=here, default=here[-1])
    parser.add_argument("--sizes", choices=("tiny", "short", "full"), default="short")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one module")
    parser.add_argument("--restart", action="store_true", help="forget what is in the folder")
    return parser.parse_args(argv)


def prepare(options: argparse.Namespace) -> int:
    """Begin a run, or go on with the one in the folder; return what holds it, see `hold`.

    Raises:
        ValueError: a peer is unknown; or the folder's run is of another kind, or still at work.
        OSError: the folder cannot be written.
    """
    wanted_peers(options.peers)
    held = run_folder.hold(options.out)
    names = ("quick", "peers", "device", "sizes")
    run: dict[str, Any] = {"environment": environment(), "limits": {}}
    run["choices"] = {name: getattr(options, name) for name in names}
    if (options.out / run_folder.RUN).exists() and not options.restart:
        rows = run_folder.resume(options.out, run)
        console.print(f"{options.out}: {rows} rows are there and are not measured again")
        return held
    console.print(f"measuring what {options.device} can do at most")
    size = TINY_STREAM_BYTES if options.sizes == "tiny" else STREAM_BYTES[options.device]
    run["limits"][options.device] = machine_limits(options.device, size)._asdict()
    run_folder.start(options.out, run)
    return held


def run_module(file: Path, options: argparse.Namespace, held: int) -> str | None:
    """Run one module, which holds the folder with us; return why it ended early, None if pytest
    came to its end."""
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "--benchmark-quiet"]
    command += [str(file), "--rows", str(options.out.resolve()), "--sizes", options.sizes]
    # Durations: the log tells where the time went.
    command += ["--device", options.device, "--peers", options.peers, "--durations", "0"]
    command += ["--quick"] if options.quick else []
    log = options.out / f"{file.stem}.log"
    with log.open("w") as shown:
        # In a session of its own: what the module started must end with it.
        how = {"cwd": ROOT, "start_new_session": True, "pass_fds": (held,)}
        child = subprocess.Popen(command, stdout=shown, stderr=subprocess.STDOUT, **how)
        try:
            status = child.wait(options.timeout)
        except subprocess.TimeoutExpired:
            return f"not done after {options.timeout:g} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if status in (0, 1, NOTHING_COLLECTED):  # 1: failed tests have said why
        return None
    return f"pytest ended with status {status}, see {log}"


def run_modules(options: argparse.Namespace, held: int) -> None:
    """Run all modules of the suite, and tell of each what came of it."""
    files = modules(options.suite)
    for number, file in enumerate(files, 1):
        before, begin = len(run_folder.lines(options.out)), time.monotonic()
        with console.status(f"{number}/{len(files)} {file.stem}"):
            reason = run_module(file, options, held)
        if reason:
            run_folder.append(options.out, {"failed": file.name, "reason": reason})
        new = run_folder.lines(options.out)[before:]
        rows, failed = (sum(kind in line for line in new) for kind in ("row", "failed"))
        text = f"{number}/{len(files)} {file.stem}: {rows} rows, {failed} failed"
        console.print(f"{text}, {time.monotonic() - begin:.0f} s", highlight=False)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        held = prepare(options)
    except (ValueError, OSError) as error:
        console.print(str(error), markup=False)
        return 2
    try:
        run_modules(options, held)
    except KeyboardInterrupt:
        console.print("stopped: the same command goes on from here")
        return STOPPED
    results = run_folder.write_results(options.out)
    for name, reason in (results["missing_peers"] | results["failed"]).items():
        console.print(f"{name}: {reason}", markup=False, highlight=False)
    console.print(f"{len(results['rows'])} rows in {options.out / 'results.json'}")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    # As Ctrl-C: by itself a SIGTERM would leave the module behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
