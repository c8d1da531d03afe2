"""The folder of a run: what is measured there once, row by row, so that a killed run can go on.

`run.json` holds the environment, limits and choices of the run. `rows.jsonl` gets a line as soon as
its test has ended: a row with its identity, a test that failed, or peers that cannot run here.
`results.json` and `results.csv` are made of both.
"""

import csv
import fcntl
import functools
import json
import os
from pathlib import Path
from typing import Any

from mistral_kernels.whole_file import write_json, write_text

RUN, LINES = "run.json", "rows.jsonl"
# Of the environment: what must not differ between the rows of one run. Dates and commands may.
SAME = (
    *("cpu", "gpu", "threads", "instruction_set", "torch", "triton", "transformers"),
    *("commit", "code"),
)


def identity(row: dict[str, Any], shape: dict[str, Any]) -> list[Any]:
    """Return what tells a row from all others of a run; its shape is that of its case."""
    return [*(row[name] for name in ("op", "case", "device", "dtype", "backend")), shape]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's rows; one that was cut off as its writer died is left out."""
    path = folder / LINES
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # its test runs again
    return found


def append(folder: Path, line: dict[str, Any]) -> None:
    with (folder / LINES).open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def choices(folder: Path) -> dict[str, Any]:
    """Return the environment, limits and choices of a run."""
    return json.loads((folder / RUN).read_text())


def hold(folder: Path) -> int:
    """Make a folder and keep other runs out of it.

    Returns:
        A file descriptor that holds the folder until it is closed here and in all processes that
        inherit it: of a run that was killed, the module that it left behind.

    Raises:
        ValueError: a run holds the folder.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise ValueError(
            f"{folder}: a run measures there, or a module that a killed run left behind: wait for"
            f" it, or end the pytest whose command line has --rows {folder.resolve()}"
        ) from error
    return held


def start(folder: Path, run: dict[str, Any]) -> None:
    """Begin a run in an empty folder."""
    (folder / LINES).unlink(missing_ok=True)
    write_json(folder / RUN, run)


def resume(folder: Path, run: dict[str, Any]) -> int:
    """Go on with the run in a folder: keep its rows, forget its failures; return the rows.

    Raises:
        ValueError: the run in the folder is one of another environment, or of other choices.
    """
    before = choices(folder)
    old, new = (_comparable(of) for of in (before, run))
    changed = [
        f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run of another kind ({'; '.join(changed)}): choose another --out, or"
            " --restart to measure all of it again"
        )
    kept = [line for line in lines(folder) if "failed" not in line]
    written = (json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    write_text(folder / LINES, "".join(written))
    return sum("row" in line for line in kept)


def _comparable(run: dict[str, Any]) -> dict[str, Any]:
    # Results that are written make the tree dirty, too; whether what runs was edited, "code" tells.
    facts = {name: run["environment"].get(name) for name in SAME}
    facts["commit"] = facts["commit"] and facts["commit"].removesuffix("-dirty")
    return facts | run["choices"]


def write_results(folder: Path) -> dict[str, Any]:
    """Write results.json, one row a line so that a new run differs by lines, and results.csv."""
    run, found = choices(folder), lines(folder)
    results: dict[str, Any] = {name: run[name] for name in ("environment", "limits", "choices")}
    results["missing_peers"] = {}
    for line in found:
        results["missing_peers"] |= line.get("missing", {})
    results["failed"] = {line["failed"]: line["reason"] for line in found if "failed" in line}
    results["rows"] = [line["row"] for line in found if "row" in line]
    dump = functools.partial(json.dumps, ensure_ascii=False)
    parts = [f' "{name}": {dump(value)}' for name, value in results.items() if name != "rows"]
    rows = ",\n".join(f"  {dump(row)}" for row in results["rows"])
    parts.append(f' "rows": [\n{rows}\n ]')
    write_text(folder / "results.json", "{\n" + ",\n".join(parts) + "\n}\n")
    _write_csv(folder / "results.csv", [_flat(row) for row in results["rows"]])
    return results


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name != "peers"}
    for peer, times in row["peers"].items():
        flat |= {f"{peer} {name}": value for name, value in times.items()}
    return flat


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
