"""Sweeps tile configurations of the Triton kernels on a GPU: `python -m benchmarks.tune --op rope`.

Candidates are the shipped configuration and its neighbours: one or two of the numbers that are free
to move, each halved or doubled, stages one less or more. They run the calls of `bench_<op>.py` on
its shapes for CUDA, or with their gradients for `<op>_backward`; the grouped products of experts
those of both ops, with weights in full and in few bits. They are timed with a cold L2. Each must be
about as near to the shipped kernel on float32 inputs as the shipped one on bf16 inputs is
(mistral_kernels.tolerance). Nothing is written back: who likes a row writes it into `tile_config`,
with GPU and date.

Without a GPU, `--dry-run` compiles the candidates of the headline shapes for `--arch`.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.errors import TritonError

from benchmarks import compilers
from benchmarks.device_time import cold_l2_s
from benchmarks.environment import environment
from benchmarks.kernel_calls import bench_calls, is_float
from benchmarks.machine_code import ARCHS
from benchmarks.tile_candidates import candidates, configured, free_numbers
from mistral_kernels.tolerance import error, low_precision_limit

CODE = ("registers", "shared", "spills", "blocks")
# What Triton raises for a candidate that does not compile or does not fit.
REFUSALS = (TritonError, RuntimeError)


def sweep(module: ModuleType, call: Callable[..., Tensor], inputs: tuple, timer=cold_l2_s) -> list:
    """A row for each candidate: the configuration, its time or why it has none; fastest first.

    No rows if the call does not come by the kernels of this file.
    """

    def result(dtype: torch.dtype | None = None) -> Tensor:
        return call(*(x.to(dtype or x.dtype, copy=True) if is_float(x) else x for x in inputs))

    exact, rows = result(torch.float32), []
    with configured(module, {}) as used:
        limit = low_precision_limit(error(result(), exact))
    for move in candidates(used[0]) if used else []:
        row = {"shipped": not move, "us": None, "note": ""}
        try:
            with configured(module, move) as row["configs"]:
                if error(result(), exact).within(limit):
                    row["us"] = 1e6 * statistics.median(timer(call, inputs))
                else:
                    row["note"] = "wrong"
        except REFUSALS as refusal:
            row["note"] = first_line(refusal)
        rows.append(row)
    return sorted(rows, key=lambda row: row["us"] or math.inf)


def first_line(refusal: Exception) -> str:
    return str(refusal).partition("\n")[0]


def compile_candidates(module: ModuleType, arch: str) -> list[dict]:
    """A row for each candidate of each headline case: registers, shared memory, spills, blocks."""
    capability, rows = compilers.capability(arch), []
    with configured(module, {}) as used:
        module.codegen_cases(capability)
    for move in candidates(used[0]):
        with configured(module, move):
            cases = [case for case in module.codegen_cases(capability) if case.get("work")]
        for case in cases:
            row = {"case": f"{case['kernel'].__name__} {case['case']}"}
            row |= {"configs": [case["constexprs"]], "shipped": not move, "note": ""}
            try:
                (code,) = compilers.compile_triton([case], arch)
                row |= {name: getattr(code, name) for name in CODE}
                row["note"] = "; ".join(code.problems())
            except REFUSALS as refusal:
                row["note"] = first_line(refusal)
            rows.append(row)
    return sorted(rows, key=lambda row: row["case"])


def table(title: str, rows: list[dict], columns: tuple[str, ...]) -> Table:
    shown = Table(title=title, title_justify="left", box=None)
    for name in ("", "configuration", *columns, "note"):
        shown.add_column(name, justify="right" if name in ("us", *CODE) else "left")
    for row in rows:
        values = (row.get(name) for name in columns)
        cells = [
            f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x) for x in values
        ]
        mark = "shipped" if row["shipped"] else ""
        configs = "; ".join(map(free_numbers, row["configs"]))
        shown.add_row(mark, configs, *cells, row["note"])
    return shown


def main(argv: list[str] | None = None) -> int:
    modules = {k: v for k, v in compilers.triton_modules().items() if hasattr(v, "tile_config")}
    parser = argparse.ArgumentParser("benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=modules, default=list(modules), metavar="FILE")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--dry-run", action="store_true", help="compile only, no GPU needed")
    parser.add_argument("--arch", choices=ARCHS, default="sm_90a", help="of --dry-run")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.tune: no CUDA device; --dry-run compiles the candidates without one")
        return 2

    console, found = Console(width=140), []
    for stem in options.op:
        if options.dry_run:
            rows = compile_candidates(modules[stem], options.arch)
            console.print(table(f"{stem}, {options.arch}", rows, ("case", *CODE)))
            found += [{"op": stem, "arch": options.arch, **row} for row in rows]
            continue
        for case, make in bench_calls(stem, "cuda", "cuda"):
            if rows := sweep(modules[stem], *make()):
                console.print(table(f"{stem}, {case}", rows, ("us",)))
            found += [{"op": stem, "case": case, **row} for row in rows]
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "rows": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
