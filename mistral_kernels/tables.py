"""The tables of `mistral-kernels info`, `verify`, `ppl` and `bench`, printed to stdout."""

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


def print_checkpoint(facts: dict[str, Any]) -> None:
    """Print what `mistral_kernels.checkpoint_info.collect_checkpoint` returned."""
    _print_table(["checkpoint", ""], _checkpoint_rows(facts))
    if facts["parameters"] is None:
        return
    parts = [(part, *numbers.values()) for part, numbers in facts["parts"].items()]
    total = ("all", facts["parameters"]["total"], facts["bytes"])
    _print_table(
        ["part", "parameters", f"as {'stored' if facts['quantisation'] else facts['dtype']}"],
        ([part, f"{count:,}", byte_size(size)] for part, count, size in [*parts, total]),
    )
    cache = facts["cache"]
    _print_table(
        ["cache of one sequence", f"as {facts['dtype']}"],
        [
            ["each token, while no window is full", byte_size(cache["bytes_per_token"])],
            *([_tokens(count, facts), byte_size(size)] for count, size in cache["bytes"].items()),
        ],
    )
    columns = ["weights", "cache", "working", "graphs", "needed", "free"]
    if not any(needs["graphs"] for needs in facts["memory"].values()):
        columns.remove("graphs")  # of no use without a GPU
    _print_table(
        [f"{facts['context']} tokens on", *columns, "fits"],
        (
            [
                f"{device}, {needs['prompt']} at once",
                *(byte_size(needs[name]) for name in columns),
                _verdict(needs["short"]),
            ]
            for device, needs in facts["memory"].items()
        ),
    )
    _print_table(
        [f"op in {facts['dtype']}", *(f"on {device}" for device in facts["ops"])],
        zip(*_columns(list(facts["ops"].values())), strict=True),
    )


def _checkpoint_rows(facts: dict[str, Any]) -> list[list[object]]:
    """What a checkpoint is, one line each; what is not known is left out."""
    files, stored, tokenizer = facts["files"], facts["stored"], facts["tokenizer"]
    stored_bytes = byte_size(sum(files.values()))
    rows = {
        "name": facts["name"],
        "folder": facts["folder"],
        "layout": facts["layout"],
        "cannot be loaded": facts["problem"],
        "weight files": f"{len(files)} of {stored_bytes}" if files else "none here",
        "values in them": [f"{count:,} {dtype}" for dtype, count in (stored or {}).items()],
    }
    if facts["parameters"]:
        total, active = (f"{count:,}" for count in facts["parameters"].values())
        rows |= {
            "of the shape of": facts["family"] or "no published model",
            "quantised": facts["quantisation"],
            "parameters": total if total == active else f"{total}, {active} active for a token",
            "windows": [f"{_window(window)} x {layers}" for window, layers in facts["windows"]],
            "made for positions": facts["max_positions"],
        }
    version = f", version {tokenizer['version']}" if tokenizer["version"] else ""
    if tokenizer["file"]:
        rows["tokenizer"] = (
            f"{tokenizer['file']}, {tokenizer['kind']}{version}, {tokenizer['vocab']:,} tokens"
        )
        rows["chat template file"] = "yes" if tokenizer["chat_template"] else "no"
    rows["tokenizer problem"] = tokenizer["problem"]
    rows["chat model"] = "yes" if facts["chat_model"] else "no sign of it"
    return [[name, value] for name, value in rows.items() if value]


def _tokens(count: int, facts: dict[str, Any]) -> str:
    """What is special about a number of tokens that a cache is measured at."""
    windows = [window for window, _ in facts["windows"]]
    marks = [f"window of {count} full"] * (count in windows)
    marks += ["all that the model was made for"] * (count == facts["max_positions"])
    return f"{count} tokens" + (f" ({', '.join(marks)})" if marks else "")


def _columns(by_device: list[dict[str, str]]) -> list[list[str]]:
    """The ops, then what serves each on one device after another."""
    ops = list(by_device[0])
    return [ops, *([served[op] for op in ops] for served in by_device)]


def _window(window: int | None) -> str:
    return "full" if window is None else str(window)


def _verdict(short: int | None) -> str:
    if short is None:
        return "free memory is not known"
    return f"no, {byte_size(short)} short" if short else "yes"


def byte_size(count: int | None) -> str | None:
    """A number of bytes with three digits or so."""
    if count is None:
        return None
    unit = min(max(count.bit_length() - 1, 0) // 10, 4)
    number = count / 2 ** (10 * unit)
    digits = 0 if unit == 0 or number >= 100 else 1 if number >= 10 else 2
    return f"{number:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


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


def print_perplexity(facts: dict[str, Any]) -> None:
    """Print what `mistral_kernels.evaluation.evaluate` returned."""
    context = f"{facts['context']} tokens" if facts["context"] else "all that the windows show"
    rows = {
        "perplexity": f"{facts['perplexity']:.4f}",
        "nats a token": f"{facts['nats_per_token']:.5f}",
        "tokens predicted": f"{facts['tokens']:,}",
        "texts": f"{facts['texts']:,}",
        "context": context,
        "tokens a second": f"{facts['tokens_per_s']:.0f}",
        "model": f"{facts['dtype']} on {facts['device']}",
    }
    _print_table(["text", ""], rows.items())


def print_speed(facts: dict[str, Any]) -> None:
    """Print what `mistral_kernels.bench.run_bench` returned."""
    model, load, limits = facts["model"], facts["load"], facts["limits"]
    # Figures of a part of a model are not those of the model.
    part = model["layers"] < model["of_layers"]
    layers = f"{model['layers']} of {model['of_layers']}: all figures are of these"
    memory = facts["peak_memory_bytes"]
    _print_table(
        ["measured", ""],
        {
            "model": f"{model['source']}, {model['weights']} weights",
            "layers": layers if part else model["layers"],
            "weights": f"{facts['weights']}, {byte_size(model['bytes'])}",
            "computes in": f"{facts['dtype']} on {facts['device']}",
            "kernels": sorted(set(facts["backends"].values())),
            "load": f"{load['batch']} x ({load['prompt']} tokens, {load['new']} new)",
            "runs": facts["repeats"],
            "time to first token": f"{facts['time_to_first_token_ms']:.2f} ms",
            "between tokens, median": f"{facts['inter_token_ms']['median']:.2f} ms",
            "between tokens, p99": f"{facts['inter_token_ms']['p99']:.2f} ms",
            "peak memory": memory and byte_size(memory),
        }.items(),
    )
    bounds = (f"{limits['read_gb_s']:g} GB/s", f"{limits['matmul_gflop_s']:g} GFLOP/s")
    _print_table(
        ["phase", "tokens/s", f"of {bounds[0]}", f"of {bounds[1]} ({limits['matmul_dtype']})"],
        (
            [name, f"{phase['tokens_per_s']:.1f}"]
            + [f"{phase[f'{bound}_fraction']:.1%}" for bound in ("bandwidth", "matmul")]
            for name, phase in ((name, facts[name]) for name in ("prefill", "decode"))
        ),
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
