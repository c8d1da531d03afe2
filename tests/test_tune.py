"""The candidates of benchmarks/tune.py: which there are, that wrong ones are refused, that they
compile. No time is measured here."""

import importlib
import json

import pytest
import torch

from benchmarks import compilers, tune
from benchmarks.kernel_calls import bench_calls
from benchmarks.tile_candidates import candidates, configured, free_numbers, moved
from mistral_kernels.kernels import rope, silu_mul


def test_candidates_move_at_most_two_free_numbers():
    config = {"BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 16, "num_stages": 1}
    moves = candidates(config)
    assert moves[0] == {} and len(moves) == 1 + 4 + 5
    for move in moves:
        new = moved(config, move)
        assert len(move) <= 2 and {name for name in config if new[name] != config[name]} == {*move}
        assert new["BLOCK_D"] == 128 and new["num_warps"] in (8, 16) and new["num_stages"] in (1, 2)
    assert {"BLOCK_N": -1, "num_stages": 1} in moves
    assert moved(config, {"BLOCK_N": -1, "num_stages": 1})["BLOCK_N"] == 32
    assert free_numbers(config) == "BLOCK_N 64, num_warps 16, num_stages 1"


def test_a_module_is_configured_for_a_while():
    shipped = silu_mul.tile_config
    arguments = (14336, torch.bfloat16, (9, 0))
    with pytest.raises(KeyError), configured(silu_mul, {"num_warps": 1}) as used:
        assert silu_mul.tile_config(*arguments)["num_warps"] == 8
        raise KeyError
    assert silu_mul.tile_config is shipped and shipped(*arguments)["num_warps"] == 4
    assert [config["num_warps"] for config in used] == [8]


@pytest.mark.parametrize(
    "stem", [stem for stem, m in compilers.triton_modules().items() if hasattr(m, "tile_config")]
)
def test_every_file_with_tiles_has_a_benchmark(stem):
    assert dict(bench_calls(stem, "cuda", "cuda"))


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_a_dry_run_compiles_the_candidates(capsys, tmp_path):
    out = tmp_path / "rows.json"
    assert tune.main(["--op", "rms_norm", "--dry-run", "--arch", "sm_80", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "rms_norm_kernel bf16 4096 add" in shown and "num_warps 16" in shown
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 3 and sum(row["shipped"] for row in rows) == 2
    assert all(row["registers"] > 0 and row["blocks"] > 0 and not row["note"] for row in rows)


def test_a_wrong_candidate_has_no_time(monkeypatch):
    """A kernel file in which more than four warps give another result and 128 do not fit."""

    class File:
        tile_config = staticmethod(lambda: {"BLOCK": 64, "num_warps": 4})

    def call(x):
        config = File.tile_config()
        if config["BLOCK"] > 64:
            raise tune.TritonError("out of resource\nand more")
        return x * 1.5 + (0.1 if config["num_warps"] > 4 else 0)

    times = iter([[4e-6], [2e-6], [3e-6], [1e-6]])
    inputs = (torch.randn(100).bfloat16(),)
    rows = tune.sweep(File, call, inputs, lambda run, inputs: next(times))
    notes = {free_numbers(row["configs"][0]): (row["us"], row["note"]) for row in rows}
    assert notes["BLOCK 64, num_warps 8"] == (None, "wrong")
    assert notes["BLOCK 128, num_warps 4"] == (None, "out of resource")
    timed = [row["us"] for row in rows if row["us"]]
    assert timed == pytest.approx([1, 2, 3, 4]) and rows[3]["shipped"]
    assert len(rows) == 9 and not any(row["us"] for row in rows[4:])


def test_a_file_that_the_call_does_not_reach_has_no_rows():
    assert tune.sweep(rope, torch.square, (torch.randn(3).bfloat16(),)) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("stem", ["silu_mul", "rms_norm_backward", "expert_combine"])
def test_candidates_of_a_real_kernel_are_right(stem):
    module = importlib.import_module(f"mistral_kernels.kernels.{stem}")
    _, make = next(bench_calls(stem, "tiny", "cpu"))
    rows = tune.sweep(module, *make(), lambda run, inputs: [1e-6])
    assert len(rows) > 1 and all(row["us"] == pytest.approx(1) for row in rows)


@pytest.mark.interpreter
@pytest.mark.parametrize("stem", ["expert_up", "expert_down"])
def test_each_product_of_a_mixture_moves_alone(stem):
    module = importlib.import_module(f"mistral_kernels.kernels.{stem}")
    cases = dict(bench_calls(stem, "tiny", "cpu"))
    formats = [format for case in cases for format in ("int4", "int8", "fp8") if format in case]
    assert len(cases) > len(formats) == 6, "both ops, each kind of codes for few and many tokens"
    for case, shipped in (("tiny-1", 64), ("tiny-9", 64), ("tiny-int4-g128-1", 32)):
        call, inputs = cases[case]()
        with configured(module, {"BLOCK_N": 1, "GROUP_M": -1}) as used:
            call(*inputs)
        (config,) = used
        assert (config["BLOCK_N"], config["GROUP_M"]) == (2 * shipped, 4)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("stem", "case"), [("expert_down", "tiny-int4-g128-1"), ("linear_low_bit", "tiny-fp8-1")]
)
def test_candidates_of_low_bit_products_are_right(stem, case, monkeypatch):
    """One of them: in the interpreter products with codes are slow."""
    module = importlib.import_module(f"mistral_kernels.kernels.{stem}")
    move = {"BLOCK_N": -1, "BLOCK_K": -1}
    monkeypatch.setattr(tune, "candidates", lambda config: [{}, move])
    make = dict(bench_calls(stem, "tiny", "cpu"))[case]
    rows = tune.sweep(module, *make(), lambda run, inputs: [1e-6])
    assert [row["us"] for row in rows] == pytest.approx([1, 1])
    ((shipped,), (moved,)) = (row["configs"] for row in rows)
    assert all(moved[name] == shipped[name] // 2 for name in move)
