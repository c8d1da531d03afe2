"""README says what is: its example runs, links and commands exist, its table is the registry."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_kernels.ops import dispatch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("last", [0, 1], ids=["own model", "transformers"])
def test_an_example_prints_what_it_says(last, tmp_path):
    """The second goes on where the first ends."""
    assert len([line for line in EXAMPLES[last].splitlines() if line]) <= 10
    code = "".join(EXAMPLES[: last + 1])
    # Without a GPU: there the model would run in bf16 on other kernels, and might say other words.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # which one of them writes to
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", code)


def test_links_and_files_exist():
    names = re.findall(r"\]\(([^)#]+)\)", README)
    names += re.findall(r"`((?:csrc|tests|kernels|benchmarks|mistral_kernels)/[\w./]+)`", README)
    names += re.findall(r"pytest (tests/\w+\.py)", README)
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_of_the_pages_exist(page):
    names = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    names += [f"../{name}" for name in re.findall(r"`(mistral_kernels/[\w./]+)`", page.read_text())]
    assert [name for name in names if not (page.parent / name).exists()] == []
    assert f"(docs/{page.name})" in README


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for line in re.findall(r"make ([a-z ]+)", README) for word in line.split()}
    assert {"demo", "test", "lint", "bench"} <= targets
    for target in ("demo", "test", "lint", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_status_table_is_the_registry():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|(.*)\|$", README, re.MULTILINE)
    table = {
        op: tuple(
            b for b, cell in zip(dispatch.BACKENDS, cells.split("|"), strict=False) if "yes" in cell
        )
        for ops, cells in rows
        for op in re.findall(r"`(\w+)`", ops)
    }
    registered = {op: dispatch.backends(op) for op in dispatch.OPS if not op.endswith("_backward")}
    assert table == registered


def test_commands_in_the_readme_exist():
    for command in sorted(set(re.findall(r"mistral-kernels (\w+)", README))):
        run = subprocess.run(
            [sys.executable, "-m", "mistral_kernels.cli", command, "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert run.returncode == 0, (command, run.stderr)


def test_length():
    assert len(README.splitlines()) < 200
