"""The benchmark suite end to end on tiny shapes: it goes on after anything that may stop it."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import environment, run, run_folder
from mistral_kernels.environment import cpu_name
from mistral_kernels.machine_limits import Limits

ROOT = Path(__file__).resolve().parents[1]
BROKEN = """
import os, signal
import pytest
from benchmarks.bench_rms_norm import SHAPES
OP = "planted"
pytestmark = pytest.mark.skipif(os.path.exists("mended"), reason="mended")

def test_wrong(bench):
    raise EOFError("planted")

def test_killed(bench):
    os.kill(os.getpid(), signal.SIGKILL)
"""
BROKEN_PEER = """
NAME = "liger"

def missing(device):
    return None

def rms_norm(shape, dtype, device):
    def call(x, weight, eps):
        raise LookupError("no such architecture")
    return call
"""


def start_suite(folder: Path) -> subprocess.Popen:
    # Not the environment of a worker of pytest-xdist, where pytest-benchmark measures nothing.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")}
    command = [sys.executable, "-m", "benchmarks.run", "--out", "out", "--sizes", "tiny"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def suite(folder: Path) -> tuple[int, str]:
    """Its exit status and what it tells on stderr."""
    started = start_suite(folder)
    told = started.communicate()[1]
    return started.returncode, told


@pytest.fixture
def copied(tmp_path) -> Path:
    """A folder with the suite, of which one benchmark is left, a broken one and a broken peer."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path in (tmp_path / "benchmarks").glob("bench_*.py"):
        if path.name != "bench_rms_norm.py":
            path.unlink()
    (tmp_path / "benchmarks" / "bench_broken.py").write_text(BROKEN)
    (tmp_path / "benchmarks" / "peers" / "liger.py").write_text(BROKEN_PEER)
    return tmp_path


def test_the_suite_goes_on_after_failures_and_resumes(copied):
    out = copied / "out"
    status, told = suite(copied)
    assert status == 1, told
    results = json.loads((out / "results.json").read_text())
    assert results["failed"].pop("bench_broken.py") == "killed by SIGKILL"
    wrong = results["failed"].values()
    assert list(wrong) == ["EOFError: planted"] * 2
    assert "planted" in told and "killed by SIGKILL" in told
    assert results["environment"]["cpu"] == cpu_name()
    assert results["limits"]["cpu"].keys() == set(Limits._fields)
    rows = results["rows"]
    assert [(row["dtype"], row["tokens"]) for row in rows] == [("float32", 3), ("bfloat16", 3)]
    for row in rows:
        assert 0 < row["q1_us"] <= row["median_us"] <= row["q3_us"]
        assert row["peers"].keys() == {"torch"} and row["peers"]["torch"]["ratio"] > 0
    assert results["missing_peers"]["liger, rms_norm tiny-3"] == "failed: no such architecture"
    assert "liger, rms_norm tiny-3: failed" in told
    with (out / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(line["torch ratio"]) for line in table] == [
        row["peers"]["torch"]["ratio"] for row in rows
    ]

    # Killed in the middle of the last row, the cause of failures mended: only that row is missing.
    (copied / "mended").touch()
    lines = (out / "rows.jsonl").read_text().splitlines()
    first, last = (line for line in lines if '"row"' in line)
    (out / "rows.jsonl").write_text(f"{first}\n{last[:-40]}")
    status, told = suite(copied)
    assert status == 0, told
    assert "1 rows are there" in told and "bench_rms_norm: 1 rows, 0 failed" in told
    again = json.loads((out / "results.json").read_text())
    assert again["failed"] == {} and again["rows"][0] == rows[0]
    assert again["rows"][1]["median_us"] > 0 and len(again["rows"]) == 2


def test_a_stopped_run_takes_its_module_with_it(copied):
    started, out = start_suite(copied), copied / "out"
    while started.poll() is None and not (out / "bench_broken.log").exists():
        time.sleep(0.05)
    time.sleep(0.5)  # pytest itself takes longer to start
    started.terminate()
    told = started.communicate()[1]
    assert (started.returncode, "goes on" in told, "Traceback" in told) == (130, True, False), told
    os.close(run_folder.hold(out))  # nobody has it


def run_of(**changes) -> dict:
    environment = dict.fromkeys(run_folder.SAME, "a") | changes
    return {"environment": environment, "limits": {}, "choices": {"quick": False}}


def test_a_run_of_another_environment_is_refused(tmp_path):
    run_folder.start(tmp_path, run_of(commit="abc"))
    run_folder.append(tmp_path, {"row": {}, "id": []})
    run_folder.append(tmp_path, {"failed": "x", "reason": "y"})
    assert run_folder.resume(tmp_path, run_of(commit="abc-dirty")) == 1
    assert run_folder.lines(tmp_path) == [{"row": {}, "id": []}]
    with pytest.raises(ValueError, match="code a -> b.*--restart"):
        run_folder.resume(tmp_path, run_of(commit="abc-dirty", code="b"))
    with pytest.raises(ValueError, match="torch a -> b.*--restart"):
        run_folder.resume(tmp_path, run_of(commit="abc", torch="b"))
    with pytest.raises(ValueError, match="quick False -> True"):
        run_folder.resume(tmp_path, run_of(commit="abc") | {"choices": {"quick": True}})


def test_a_missing_peer_is_listed_once(tmp_path):
    run_folder.start(tmp_path, run_of())
    for _ in range(2):
        run_folder.append(tmp_path, {"missing": {"flashinfer": "not installed"}})
    assert run_folder.write_results(tmp_path)["missing_peers"] == {"flashinfer": "not installed"}


def test_a_module_that_takes_too_long_is_stopped(tmp_path):
    options = run.arguments(["--out", str(tmp_path), "--sizes", "tiny", "--timeout", "0.1"])
    held = run_folder.hold(tmp_path)
    reason = run.run_module(ROOT / "benchmarks" / "bench_rms_norm.py", options, held)
    assert reason == "not done after 0.1 s"
    os.close(held)


def test_a_folder_is_held_by_what_a_killed_run_left_behind(tmp_path, capsys):
    held = run_folder.hold(tmp_path)
    left = subprocess.Popen(["sleep", "600"], pass_fds=(held,))
    os.close(held)
    assert run.main(["--out", str(tmp_path), "--sizes", "tiny"]) == 2
    assert str(tmp_path) in capsys.readouterr().err.replace("\n", "")
    assert list(tmp_path.iterdir()) == []
    left.kill()
    left.wait()
    os.close(run_folder.hold(tmp_path))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run.main(["--out", str(tmp_path / "file" / "out"), "--sizes", "tiny"]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_no_commit_is_known_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None


def test_code_is_known_by_what_is_in_it(copied, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", copied)
    before, new = environment.code(), copied / "benchmarks" / "new.py"
    (copied / "benchmarks" / "results.json").touch()
    assert environment.code() == before
    new.touch()
    added = environment.code()
    new.write_text("BUDGET_S = 0.5")
    assert len({before, added, environment.code()}) == 3
    new.unlink()
    assert environment.code() == before


def test_the_suites_share_all_benchmarks():
    ops, model, every = (set(run.modules(suite)) for suite in ("ops", "model", "all"))
    assert ops | model == every and not ops & model
    assert {"bench_rms_norm", "bench_linear"} <= {path.stem for path in ops}
    assert "bench_model" in {path.stem for path in model}
