"""Plots of a benchmark's results. The same results give the same bytes: no date, no random ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
PLOTTED_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
OURS = "mistral_kernels"


class Curves(NamedTuple):
    """Time over one size of the cases of an op, ours and each peer's."""

    title: str
    op: str
    size: str  # the column on the x axis; all other sizes are the same


CURVES = {
    "attention": Curves("Prefill attention", "prefill_attention", "tokens"),
    "decode": Curves("Decode attention, one token a sequence", "decode_attention", "batch"),
    "experts": Curves("expert_mlp", "expert_mlp", "tokens"),
}
# Sizes in a row that make a case; the one on the x axis is left out of what must be alike.
SIZES = ("batch", "tokens", "q_heads", "kv_heads", "head_dim", "window")
SIZES += ("hidden", "ffn_dim", "experts", "top_k")


def draw_all(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the results hold enough rows for; return the files, one PNG a plot."""
    plots: dict[str, Callable] = {
        name: lambda axes, rows, curves=curves: _curves(axes, rows, curves)
        for name, curves in CURVES.items()
    }
    plots["roofline"] = lambda axes, rows: _roofline(axes, rows, results["limits"])
    plots["model"] = _model
    device = "cuda" if "cuda" in results["limits"] else "cpu"
    wanted = {"device": device, "dtype": PLOTTED_DTYPE[device]}
    rows = [row for row in results["rows"] if wanted.items() <= row.items()]
    return [
        path
        for name, plot in plots.items()
        if _draw(plot, rows, results["environment"], path := folder / f"{name}.png")
    ]


def _draw(plot: Callable, rows: list[Row], machine: dict[str, Any], path: Path) -> bool:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    if not plot(axes, rows):
        return False
    caption = f"{machine['gpu'] or machine['cpu']}, {rows[0]['dtype']}, torch {machine['torch']},"
    caption += f" commit {machine['commit']}, {machine['date']}"
    figure.supxlabel(caption, fontsize=7)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})  # not matplotlib's version
    return True


def _alike(rows: list[Row], curves: Curves) -> list[Row]:
    """Return the most rows of the op that differ in that size only, in its order."""
    groups: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        if row["op"] == curves.op:
            rest = (*(row.get(size) for size in SIZES if size != curves.size), row["backend"])
            groups.setdefault(rest, {})[row[curves.size]] = row
    longest = max(groups.values(), key=len, default={})
    return [longest[size] for size in sorted(longest)]


def _curves(axes, rows: list[Row], curves: Curves) -> bool:
    rows = _alike(rows, curves)
    if len(rows) < 2:
        return False
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, time in {OURS: row, **row["peers"]}.items():
            points.setdefault(name, []).append((row[curves.size], time["median_us"] / 1e3))
    for name, line in points.items():
        axes.loglog(*zip(*line, strict=True), marker="o", label=name)
    ticks = [row[curves.size] for row in rows]
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    same = [size for size in SIZES if size != curves.size and rows[0].get(size) is not None]
    sizes = ", ".join(f"{size} {rows[0][size]}" for size in same)
    axes.set(xlabel=curves.size, ylabel="median time, ms")
    axes.set_title(f"{curves.title}\n{sizes}", fontsize=9)
    axes.legend(fontsize=8)
    return True


def _roofline(axes, rows: list[Row], limits: dict[str, dict[str, float]]) -> bool:
    """The rate of useful work over operations per byte, under the limits of the same run."""
    kept = [row for row in rows if row["gb_s"] and row["gflop_s"]]
    if not kept:
        return False
    limit = limits[kept[0]["device"]]
    intensities = {row["case"]: row["gflop_s"] / row["gb_s"] for row in kept}
    ends = [min(intensities.values()) / 2, max(intensities.values()) * 2]
    ridge = limit["matmul_gflop_s"] / limit["read_gb_s"]
    corners = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
    roof = [min(limit["matmul_gflop_s"], x * limit["read_gb_s"]) for x in corners]
    axes.loglog(corners, roof, color="black", label="read bandwidth, matmul")
    for op in dict.fromkeys(row["op"] for row in kept):
        mine = [row for row in kept if row["op"] == op]
        x = [row["gflop_s"] / row["gb_s"] for row in mine]
        axes.loglog(x, [row["gflop_s"] for row in mine], "o", markersize=4, label=op)
    axes.set(xlabel="useful operations per byte", ylabel="useful GFLOP/s")
    axes.set_title("Roofline; points above it had their tensors in a cache", fontsize=9)
    axes.legend(fontsize=6, ncols=2)
    return True


def _model(axes, rows: list[Row]) -> bool:
    """Time of a token of whole models, a bar for ours and each peer."""
    rows = [row for row in rows if row["op"] == "model" and row["tokens"] == 1]
    if not rows:
        return False
    names = list(dict.fromkeys([OURS, *(name for row in rows for name in row["peers"])]))
    for i, name in enumerate(names):
        times = [(row if name == OURS else row["peers"].get(name)) for row in rows]
        places = [j + 0.8 * i / len(names) for j, time in enumerate(times) if time]
        heights = [time["median_us"] / 1e3 for time in times if time]
        axes.bar(places, heights, 0.8 / len(names), label=name, align="edge")
    axes.set_xticks([j + 0.4 for j in range(len(rows))], [row["case"] for row in rows], fontsize=8)
    axes.set(ylabel="median time of a token, ms", title="Decode of whole models")
    axes.legend(fontsize=8)
    return True
