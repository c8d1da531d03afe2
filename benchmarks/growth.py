"""What grows how, and the models' published headlines beside ours: a section of docs/benchmarks.md.

`python -m benchmarks.growth FILE` prints it for a file of results and fails where time grows
otherwise than it must.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MISSING = "not measured"
DTYPES = ("float32", "bfloat16")  # columns of the headlines
FITTED_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
FEWEST_POINTS = 3  # a line through two points has no residual

Row = dict[str, Any]


class Fit(NamedTuple):
    """y = c * x ** exponent, by least squares of log y over log x."""

    exponent: float
    error: float  # standard error of the exponent

    def __str__(self) -> str:
        # The published bounds have one digit behind the point; -0.00 would look like a finding.
        return f"{round(self.exponent, 2) + 0.0:.2f} +- {self.error:.2f}"


class Series(NamedTuple):
    """Rows of `bench_scaling` that differ in one size."""

    label: str
    cases: str  # how their names begin
    size: str  # the column that differs
    wanted: float | None = None  # exponent of its time that must hold, within MARGIN

    def missed_by(self, fit: Fit) -> bool:
        return self.wanted is not None and abs(fit.exponent - self.wanted) > MARGIN


MARGIN = 0.1
SERIES = (
    Series("prefill over tokens of the prompt", "prefill-tokens-", "tokens", 1.0),
    Series("prefill over batch, 128 tokens each", "prefill-batch-", "batch"),
    Series("prefill of 512 tokens over experts, top 2", "prefill-experts-", "experts"),
    Series("a decode step over tokens in the cache", "decode-tokens-", "context", 0.0),
    Series("a decode step over batch", "decode-batch-", "batch"),
    Series("a decode step over experts, top 2", "decode-experts-", "experts"),
)
HEADLINES = {  # case of bench_headlines -> label
    "attention-16k": "attention of 16k tokens: window 4096 against all, times faster",
    "prefill-16k": "the same, whole prefill",
    "cache-32k": "cache of 32k tokens: ring of 4096 against all, share of the bytes",
    "mixtral-decode": "Mixtral 8x7B against Llama 2 70B, decode, times faster",
}


def exponent(points: Sequence[tuple[float, float]]) -> Fit:
    """Fit the power of x with which y grows.

    Args:
        points: (x, y), all > 0, at least three.

    Raises:
        ValueError: there are too few points, or all have one x.
    """
    if len(points) < FEWEST_POINTS or len({x for x, _ in points}) < 2:
        raise ValueError(f"exponent: expected {FEWEST_POINTS} points or more, got {points}")
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in logs)
    return Fit(slope, math.sqrt(residual / (len(logs) - 2) / spread))


def section(results: dict[str, Any], device: str = "cpu") -> str:
    """Return the part of docs/benchmarks.md on headlines and growth, in Markdown.

    Args:
        results: "rows" as the benchmarks write them; any of them may be missing, and says so.
        device: "cpu" or "cuda", whose rows are shown.
    """
    rows = [row for row in results["rows"] if row["device"] == device]
    lines = [_line("published", "figure", *DTYPES, "source"), _line(*["---"] * 5)]
    lines += [_headline(rows, case) for case in HEADLINES]
    lines += ["", _line("time and memory of", "range", "time", "grows as", "memory, grows as")]
    lines += [_line(*["---"] * 5)]
    lines += [_growth(_of(rows, series, device), series) for series in SERIES]
    return "\n".join(lines)


def missed(results: dict[str, Any]) -> list[str]:
    """Return a text for each series whose time was measured and grows otherwise than it must."""
    found = []
    for device in FITTED_DTYPE:
        for series in SERIES:
            points = _points(_of(results["rows"], series, device), series, "median_us")
            if len(points) >= FEWEST_POINTS and series.missed_by(fit := exponent(points)):
                found.append(
                    f"{device}: {series.label}: grows as {series.size}^{fit},"
                    f" expected {series.wanted} +- {MARGIN}"
                )
    return found


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _headline(rows: list[Row], case: str) -> str:
    found = {row["dtype"]: row for row in rows if (row["op"], row["case"]) == ("headlines", case)}
    ours = [f"{found[dtype]['ours']:.3g}" if dtype in found else MISSING for dtype in DTYPES]
    if not found:
        return _line(HEADLINES[case], "", *ours, "")
    row = next(iter(found.values()))
    return _line(HEADLINES[case], f"{row['published']:g}", *ours, row["source"])


def _of(rows: list[Row], series: Series, device: str) -> list[Row]:
    """The rows of a series, by size."""
    wanted = {"op": "scaling", "device": device, "dtype": FITTED_DTYPE[device]}
    found = [row for row in rows if wanted.items() <= row.items()]
    found = [row for row in found if row["case"].startswith(series.cases)]
    return sorted(found, key=lambda row: row[series.size])


def _points(rows: list[Row], series: Series, column: str) -> list[tuple[float, float]]:
    """(size, column) of the rows that have that column and something in it."""
    return [(row[series.size], row[column]) for row in rows if row.get(column)]


def _three_digits(number: float) -> str:
    return f"{float(f'{number:.3g}'):g}"  # 5130, where .3g alone says 5.13e+03


def _growth(rows: list[Row], series: Series) -> str:
    times = _points(rows, series, "median_us")
    if len(times) < FEWEST_POINTS:
        return _line(series.label, "", MISSING, "", "")
    (first, first_us), (last, last_us) = times[0], times[-1]
    fit = exponent(times)
    grows = f"{series.size}^({fit})"
    if series.wanted is not None:
        grows += f", wanted {series.wanted:g} +- {MARGIN:g}"
        grows += ": **missed**" if series.missed_by(fit) else ""
    memory = _points(rows, series, "memory_bytes")
    bytes_grow = MISSING
    if len(memory) == len(times):
        largest = f"{memory[0][1] / 2**20:.3g} to {memory[-1][1] / 2**20:.3g} MiB"
        bytes_grow = f"{largest}, {series.size}^({exponent(memory)})"
    took = f"{_three_digits(first_us / 1e3)} to {_three_digits(last_us / 1e3)} ms"
    return _line(series.label, f"{first} to {last}", took, grows, bytes_grow)


def main(argv: list[str]) -> int:
    """Print the section for a file of results; 1 if a growth that must hold does not, 2 without
    results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("file", type=Path, help="results.json of a run")
    path = parser.parse_args(argv).file
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path}: {error}")
    devices = [name for name in FITTED_DTYPE if any(r["device"] == name for r in results["rows"])]
    for device in devices or FITTED_DTYPE:
        print(section(results, device))
    failures = missed(results)
    print(*failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
