"""Every benchmark runs on tiny shapes and agrees with its peers; its row says what was measured."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.bench_model import config_of
from benchmarks.device_time import REPEATS
from benchmarks.timing import Work, check_agreement, summary
from mistral_kernels.machine_limits import Limits
from mistral_kernels.model.config_writing import huggingface_config
from mistral_kernels.model.weight_table import parameter_shapes

ROOT = Path(__file__).resolve().parents[1]
# Not those of a worker of pytest-xdist, in which pytest-benchmark measures nothing.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")}


def run_benchmarks(*arguments: str) -> str:
    shown = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--sizes", "tiny", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stdout[-4000:]
    return shown.stdout


def test_every_benchmark_runs():
    files = sorted(map(str, (ROOT / "benchmarks").glob("bench_*.py")))
    shown = run_benchmarks("--benchmark-disable", *files)
    for path in files:
        assert f"PASSED benchmarks/{Path(path).name}" in shown


@pytest.mark.parametrize("name", ["model", "low_bit", "transformers"])
def test_whole_models_fit_a_gpu_of_80_gb_beside_a_peer(name):
    cases = importlib.import_module(f"benchmarks.bench_{name}").SHAPES["cuda"]
    kinds = set()
    for shape in cases.values():
        assert shape.context + shape.tokens > 511 and shape.window == 4096
        config = config_of(shape)
        kinds.add(huggingface_config(config)["model_type"])
        weights = 2 * sum(map(math.prod, parameter_shapes(config).values()))
        assert 14e9 < weights < 25e9
    assert kinds == {"mistral", "mixtral"}


def test_a_row_holds_rates_shares_and_ratios():
    samples = {"ours": [1e-3, 3e-3, 2e-3], "torch": [4e-3, 4e-3, 4e-3]}
    limits = Limits(read_gb_s=10.0, copy_gb_s=5.0, matmul_gflop_s=100.0)
    row = summary(samples, Work(bytes=10**7, flops=10**6), limits)
    assert (row["median_us"], row["rounds"], row["gb_s"], row["gflop_s"]) == (2e3, 3, 5.0, 0.5)
    assert (row["limit"], row["limit_fraction"]) == ("read", 0.5)
    assert row["peers"]["torch"]["ratio"] == 2.0
    assert summary(samples, Work(10**7, 10**6, writes=True), limits)["limit_fraction"] == 1.0
    assert summary(samples, Work(10**3, 10**8), limits)["limit"] == "matmul"


def test_contestants_that_disagree_are_refused():
    ours = torch.tensor([1.0, -2.0])
    check_agreement({"ours": ours, "torch": ours + 1e-3}, 1e-3)
    with pytest.raises(AssertionError, match="torch is off by"):
        check_agreement({"ours": ours, "torch": ours + 3e-3}, 1e-3)
    with pytest.raises(AssertionError, match="torch is off by nan"):
        check_agreement({"ours": ours, "torch": ours * torch.nan}, 1e-3)


def test_contestants_take_turns_on_a_gpu(monkeypatch):
    order = []

    def timed(run, inputs, repeats):
        order.append(run())
        return [1e-3] * repeats

    monkeypatch.setattr(timing, "cold_l2_s", timed)
    benchmark = SimpleNamespace(pedantic=lambda *_, **__: None, params={"backend": "reference"})
    calls = {name: lambda name=name: name for name in ("ours", "torch")}
    samples = timing._on_gpu(benchmark, calls, tuple, ())
    assert order == ["ours", "torch"] * timing.GPU_TURNS
    assert [len(times) for times in samples.values()] == [REPEATS, REPEATS]


PEAKS = """
import torch
from mistral_kernels.peak_memory import peak_bytes
for blocks in (1, 64, 64):  # small ones are kept when they are freed: a second call reuses them
    size = (64 << 20) // blocks
    print(peak_bytes(lambda: [torch.ones(size, dtype=torch.uint8) for _ in range(blocks)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells its peak")
def test_peak_memory_is_that_of_the_call():
    # A process of its own: in this one other tests' threads free and take memory meanwhile.
    shown = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for peak in shown.stdout.split():
        assert peak == "None" or 0.9 < int(peak) / (64 << 20) < 1.5
    assert len(shown.stdout.split()) == 3
