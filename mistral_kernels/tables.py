"""The tables of `mistral-kernels info` and `verify`, printed to stdout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from mistral_kernels.verify import Report

# Columns that a table may take where no terminal limits it; a narrower table takes fewer.
PIPE_WIDTH = 200


def print_info(facts: dict[str, Any]) -> None:
    """Print what `mistral_kernels.info.collect` returned."""
    machine = {f"{name} version": value for name, value in facts["versions"].items()}
    machine |= {f"built with {name}": value for name, value in (facts["built"] or {}).items()}
    machine["instruction set used here"] = facts["instruction_set"]
    machine |= {f"CUDA {name}": value for name, value in facts["cuda"].items()}
    for index, gpu in enumerate(facts["gpus"]):
        memory_gib = gpu["memory_bytes"] / 2**30
        machine[f"GPU {index}"] = f"{gpu['name']}, {gpu['arch']}, {memory_gib:.0f} GiB"
    _print_table(["machine", ""], machine.items())
    _print_table(
        ["backend", ""], ((name, why or "available") for name, why in facts["backends"].items())
    )
    devices = list(facts["ops"].values())[0]
    _print_table(
        ["op", *(f"on {device}" for device in devices)],
        ([op, *served.values()] for op, served in facts["ops"].items()),
    )


def print_report(report: Report) -> None:
    """Print each backend's verdict, and which backend served each op."""
    tokens = " and ".join(map(str, report.tokens))
    window = report.wrapped_window
    rings = f"the ring of window {window} wraps" if window else "no ring wraps"
    print(f"{report.folder}, {report.dtype} on {report.device}")
    print(f"{tokens} tokens in {report.steps} steps; {rings}")
    columns = ["backend", "largest error", "limit", "mean error", "limit", "diverges at", "result"]
    verdicts = []
    for row in report.rows:
        errors = [None] * 4
        if row.error is not None:
            pairs = zip(row.error, row.limit, strict=True)
            errors = [f"{number:.1e}" for pair in pairs for number in pair]
        result = f"{row.result}: {row.reason}" if row.reason else row.result
        verdicts.append([row.backend, *errors, row.first_layer, result])
    _print_table(columns, verdicts)
    served = {row.backend: row.ops for row in report.rows if row.ops}
    ops = next(iter(served.values()))
    _print_table(
        ["op", *(f"with {backend}" for backend in served)],
        ([op, *(by_op[op] for by_op in served.values())] for op in ops),
    )


def _print_table(columns: list[str], rows: Iterable[Iterable[object]]) -> None:
    """Print cells as text, with "-" for None and commas between the entries of a list."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(_cell, row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
