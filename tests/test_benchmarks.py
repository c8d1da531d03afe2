"""Every benchmark runs: one call of each case, nothing timed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_benchmark_runs():
    files = sorted(map(str, (ROOT / "benchmarks").glob("bench_*.py")))
    shown = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--benchmark-disable", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stdout[-4000:]
    for path in files:
        assert f"PASSED benchmarks/{Path(path).name}" in shown.stdout
