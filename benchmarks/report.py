"""README's tables and plots of speed, from committed results: `python -m benchmarks.report`.

Results are benchmarks/results/<machine>/results.json, "cpu" and one folder a GPU, as `make bench`
and `benchmarks.run` write them. Everything that README shows stands in them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import growth, plots
from benchmarks.growth import MISSING, exponent

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GROWTH = ROOT / "docs" / "benchmarks.md"
FOLDER = ROOT / "benchmarks" / "results"
CPU = "cpu"  # its folder; all others are of GPUs
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HEADER = "| case | against | wanted | float32 | bfloat16 |"
DTYPES = ("float32", "bfloat16")  # the last two columns
NOTHING: dict[str, Any] = {"environment": {}, "limits": {}, "rows": []}
LENGTHS = ("2k", "4k", "8k", "16k")  # of the plot and the exponents


class Line(NamedTuple):
    """A case of the results, and one peer of it."""

    label: str
    op: str
    case: str
    peer: str
    wanted: str = ""  # times faster than the peer; empty: no bar was set; 0.97 is 1.03x its time


ATTENTION = "attention, 8k tokens, window 512, 16/4 heads of 64"
DENSE = "dense-180m: a token after 2048, window 512"
MIXTRAL = "mixtral-191m: the same"
LINES = (
    Line(ATTENTION, "prefill_attention", "small-8k-w512", "masked sdpa", "6"),
    Line(ATTENTION, "prefill_attention", "small-8k-w512", "sdpa in blocks", "1.3"),
    Line(DENSE, "model", "dense-180m-decode", "transformers", "2"),
    Line(MIXTRAL, "model", "mixtral-191m-decode", "transformers", "2.5; bfloat16 3"),
    *(
        Line(
            *(f"{name}, prompt of {tokens}", "model", f"{name}-prefill-{tokens}"),
            *("transformers", "0.97"),
        )
        for name in ("dense-180m", "mixtral-191m")
        for tokens in (128, 512, 2048, 8192)
    ),
    Line("`decode_attention`, window 4096, 32/8 heads", "decode_attention", "7b-1-w4096", "sdpa"),
    Line("`linear`, 1 row, 1024 to 7168", "linear", "small-w13-1", "torch"),
    Line("`linear`, 8 rows", "linear", "small-w13-8", "torch"),
    Line("`expert_mlp`, 1 token, 8 x 512 x 1792", "expert_mlp", "small-1", "grouped_mm"),
    Line("`expert_mlp`, 512 tokens", "expert_mlp", "small-512", "grouped_mm"),
    Line("`rms_norm`, 2048 x 1024", "rms_norm", "small-2048", "torch"),
    Line("`rope_`, 2048 x 20 heads of 64", "rope_", "small-2048", "torch"),
    Line("`silu_mul`, 2048 x 3584", "silu_mul", "small-2048", "torch"),
    Line("`store_kv_`, 512 x 4 heads of 64", "store_kv_", "small-chunk-512", "torch"),
    Line("`route_experts`, 2048 x 8", "route_experts", "8x7b-2048", "torch"),
)  # fmt: skip


GPU_LINES = (
    *(
        Line("attention, 16k tokens, window 4096", "prefill_attention", "7b-16k-w4096", peer)
        for peer in ("sdpa in blocks", "varlen_attn")
    ),
    *(
        Line(f"decode, window 4096, batch {batch}", "decode_attention", f"7b-{batch}-w4096", "sdpa")
        for batch in (1, 8, 32)
    ),
    *(
        Line(f"`expert_mlp`, 8x7B, tokens {tokens}", "expert_mlp", f"8x7b-{tokens}", "grouped_mm")
        for tokens in (1, 4096)
    ),
    *(
        Line(f"{name}: a token after 512", "model", f"{name}-decode", peer)
        for name in ("mistral-7b", "mixtral-8x7b-8-layers")
        for peer in ("transformers", "transformers-compiled")
    ),
)


def section(machines: dict[str, dict[str, Any]]) -> str:
    """Return README's part on speed, in Markdown.

    Args:
        machines: name of a folder -> "environment", "limits" and "rows" of its results; rows may
            be missing and say so, and so may the peers of a row.
    """
    parts = [cpu_section(machines.get(CPU, NOTHING))]
    gpus = {name: results for name, results in sorted(machines.items()) if name != CPU}
    if gpus:
        parts.append(gpu_section(gpus))
    else:
        parts[0] += f" GPU: {MISSING}."
    return "\n\n".join(parts)


def growth_section(machines: dict[str, dict[str, Any]]) -> str:
    """Return the same for docs/benchmarks.md: headlines, growth, where peers are faster, plots."""
    parts = []
    for name, results in machines.items():
        device = "cpu" if name == CPU else "cuda"
        parts += [growth.section(results, device), faster_peers(results)]
        parts.append(_machine(results, device))
        drawn = sorted((FOLDER / name).glob("*.png"))
        parts.append("\n".join(f"![{plot.stem}](../{plot.relative_to(ROOT)})" for plot in drawn))
    return "\n\n".join(filter(None, parts))


def faster_peers(results: dict[str, Any]) -> str:
    """Return a table of all cases in which a peer takes less than 0.97 of our time."""
    lines = ["| a peer is faster | case | dtype | ours | against | times |", "|" + " --- |" * 6]
    for row in results["rows"]:
        case = f"{row['op']}, {row['backend']} | {row['case']} | {row['dtype']}"
        for peer, time in row["peers"].items():
            if time["ratio"] < 0.97:
                times = duration(row["median_us"]), f"{peer}: {duration(time['median_us'])}"
                lines.append(f"| {case} | {' | '.join(times)} | {time['ratio']:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def gpu_section(gpus: dict[str, dict[str, Any]]) -> str:
    """Return the table of GPUs, a column each, in bfloat16, and under it where they were."""
    names = [results["environment"]["gpu"] for results in gpus.values()]
    lines = [f"| case | against | {' | '.join(names)} |", "|" + " --- |" * (2 + len(names))]
    for line in GPU_LINES:
        rows = (find(of, line.op, line.case, "bfloat16", "cuda") for of in gpus.values())
        lines.append(f"| {line.label} | {line.peer} | {' | '.join(_cell(line, r) for r in rows)} |")
    return "\n\n".join(["\n".join(lines), *(_machine(of, "cuda") for of in gpus.values())])


def cpu_section(results: dict[str, Any]) -> str:
    """Return the table of the CPU, what grows how, and where it was measured."""
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    for line in LINES:
        rows = (find(results, line.op, line.case, dtype) for dtype in DTYPES)
        cells = (line.label, line.peer, line.wanted, *(_cell(line, row) for row in rows))
        lines.append(f"| {' | '.join(cells)} |")
    notes = [note for note in (_scaling(results), _machine(results, "cpu")) if note]
    return "\n".join(lines + [part for note in notes for part in ("", note)])


def find(
    results: dict[str, Any], op: str, case: str, dtype: str, device: str = "cpu"
) -> dict[str, Any] | None:
    """Return the fastest backend's row of a case, None if it was not measured."""
    wanted = {"op": op, "case": case, "dtype": dtype, "device": device}
    rows = (row for row in results["rows"] if wanted.items() <= row.items())
    return min(rows, key=lambda row: row["median_us"], default=None)


def _cell(line: Line, row: dict[str, Any] | None) -> str:
    """Our time, the peer's, how many times faster that is, and the share of the limit."""
    if row is None:
        return MISSING
    ours = duration(row["median_us"])
    if row["backend"] == "reference":
        ours += " (reference)"
    if row["op"] == "model" and row["tokens"] > 1:
        ours += f" ({row['layers']} layer{'s' if row['layers'] > 1 else ''})"
    peer = row["peers"].get(line.peer)
    theirs = f", {line.peer} {MISSING}"
    if peer is not None:
        theirs = f" against {duration(peer['median_us'])}: {peer['ratio']:.2f}x"
    return f"{ours}{theirs}; {100 * row['limit_fraction']:.0f} % of {row['limit']}"


def duration(us: float) -> str:
    """Return a time in three digits and a unit that suits it."""
    for unit, factor in (("us", 1), ("ms", 1e3), ("s", 1e6)):
        if us < 1e3 * factor or unit == "s":
            digits = max(0, 2 - math.floor(math.log10(us / factor)))
            return f"{us / factor:.{digits}f} {unit}"
    raise AssertionError("the last unit takes any time")


def _attention(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = (
        find(results, "prefill_attention", f"small-{length}-w512", "float32") for length in LENGTHS
    )
    return [row for row in rows if row]


def _scaling(results: dict[str, Any]) -> str:
    rows = _attention(results)
    if len(rows) < len(LENGTHS):
        return ""
    time = exponent([(row["tokens"], row["median_us"]) for row in rows]).exponent
    text = f"From 2k to 16k tokens the time of windowed attention grows as tokens^{time:.2f}"
    memory = [(row["tokens"], row["peak_bytes"]) for row in rows if row.get("peak_bytes")]
    if len(memory) == len(rows):
        text += f", its memory (output and scratch) as tokens^{exponent(memory).exponent:.2f}"
    return f"{text}: ![time over tokens]({(FOLDER / CPU).relative_to(ROOT)}/attention.png)"


def _machine(results: dict[str, Any], device: str) -> str:
    machine, limits = results["environment"], results["limits"].get(device)
    if limits is None:
        return ""
    peer = (
        f"transformers {machine['transformers']}"
        if machine["transformers"]
        else ("transformers not installed")
    )
    place = f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    if device == "cuda":
        place = machine["gpu"]
    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device]
    return (
        f"Medians on {place}, torch {machine['torch']}, {peer}, {machine['date']},"
        f" commit {machine['commit']}, `{machine['command']}`. Ours and the peers took turns."
        f" Limits measured as the run began: read {limits['read_gb_s']:.1f} GB/s,"
        f" copy {limits['copy_gb_s']:.1f} GB/s (both ways),"
        f" {dtype} matmul {limits['matmul_gflop_s']:.0f} GFLOP/s; a case"
        " passes 100 % if its tensors lie in a cache, if it multiplies faster than that matmul of"
        " torch's, in another dtype for example, or if the machine was faster later."
    )


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results below a folder: name of the folder that has a results.json -> results."""
    files = sorted(folder.glob("*/results.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def replace_section(readme: str, text: str) -> str:
    """Return `readme` with `text` between its two markers.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"benchmarks: expected {BEGIN} and {END}, each once and in this order")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    machines = load(FOLDER)
    if not machines:
        print(f"{FOLDER.relative_to(ROOT)}: no results; `make bench` makes them")
        return 1
    for name, results in machines.items():
        plots.draw_all(results, FOLDER / name)
    for document, made in ((README, section(machines)), (GROWTH, growth_section(machines))):
        document.write_text(replace_section(document.read_text(), made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
