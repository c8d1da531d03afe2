"""`mistral-kernels bench`: its figures, what becomes of its options, and what it refuses."""

import json
import os
import re

import pytest
import torch
from command_line import Ended, assert_refused, run_cli

from mistral_kernels import ModelConfig, __version__, bench, machine_limits
from mistral_kernels.bench_subject import first_layers
from mistral_kernels.machine_limits import Limits
from mistral_kernels.model import TINY_MIXTRAL, families

SMALL = ("--device", "cpu", "--prompt", 9, "--new", 3, "--repeats", 2)
TINY_SHAPE = {"hidden": 64, "q_heads": 8, "head_dim": 16, "ffn_dim": 256, "vocab": 96}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Limits that are measured in no time, as they are not looked at."""
    monkeypatch.setitem(machine_limits.STREAM_BYTES, "cpu", 1 << 18)
    monkeypatch.setitem(machine_limits.MATMUL, "cpu", (32, torch.float32))


@pytest.fixture
def tiny_shapes(monkeypatch):
    """Published names that stand for tiny models."""
    for name in ("mistral-7b-v0.1", "mixtral-8x7b-v0.1", "ministral-8b-instruct-2410"):
        monkeypatch.setitem(families.NAMES, name, families.NAMES[name] | TINY_SHAPE)


def bench_json(*arguments: object) -> dict:
    ended = run_cli("bench", *SMALL, "--json", "-", *arguments)
    assert (ended.status, ended.err) == (0, ""), ended.err
    return json.loads(ended.out)


def refused(*arguments: object) -> Ended:
    return run_cli("bench", "--device", "cpu", *arguments)


def test_the_figures_of_the_embedded_model_agree_with_each_other():
    facts = bench_json("--batch", 2)
    assert facts["load"] == {"batch": 2, "prompt": 9, "new": 3} and facts["repeats"] == 2
    for phase, tokens in (("prefill", 2 * 9), ("decode", 2 * 2)):
        figures = facts[phase]
        assert figures["tokens"] == tokens and figures["seconds"] > 0
        assert figures["tokens_per_s"] == tokens / figures["seconds"]
        assert figures["bandwidth_fraction"] > 0 and figures["matmul_fraction"] > 0
    assert facts["time_to_first_token_ms"] == 1e3 * facts["prefill"]["seconds"]
    between = facts["inter_token_ms"]
    assert 0 < between["median"] <= between["p99"]
    # Two runs of two steps each: no step is longer than the longer run.
    assert between["p99"] >= 1e3 * facts["decode"]["seconds"] / 2
    assert facts["peak_memory_bytes"] is None or facts["peak_memory_bytes"] > 1 << 20
    model = facts["model"]
    assert model["weights"] == "checkpoint" and model["layers"] == model["of_layers"] == 4
    assert model["bytes"] == 2 * model["parameters"]
    assert (facts["dtype"], facts["weights"], facts["device"]) == ("bfloat16", "bfloat16", "cpu")
    assert facts["limits"].keys() == {*Limits._fields, "matmul_dtype"}
    assert facts["environment"]["torch"] == torch.__version__
    assert facts["environment"]["mistral_kernels"] == __version__
    assert facts["backends"]["decode_attention"] in ("cpu", "reference")


def test_a_table_and_a_file(tmp_path, tiny_shapes):
    out = tmp_path / "speed.json"
    out.write_text("older")
    model = ("--model", "mistralai/Mistral-7B-v0.1", "--random-weights", "--layers", 2)
    ended = run_cli("bench", *SMALL, *model, "--json", out, "--backend", "reference", terminal=True)
    assert ended.status == 0
    facts = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert set(facts["backends"].values()) == {"reference"}
    for text in (f"{facts['decode']['tokens_per_s']:.1f}", "2 of 32: all figures are of these"):
        assert text in ended.out
    assert "random weights" in ended.out and "steps" in ended.err
    assert re.search(r"kernels +. reference ", ended.out)


@pytest.mark.parametrize("weights", ["bf16", "int4", "int8", "fp8"])
def test_random_weights_in_few_bits(tiny_shapes, weights):
    name = "ministral-8b-instruct-2410"  # whose windows differ between layers
    if weights in ("int4", "bf16"):
        name = "mistral-7b-v0.1"
    model = ("--model", name, "--random-weights", "--layers", 2, "--weights", weights)
    facts = bench_json(*model)
    full = 2 * facts["model"]["parameters"]
    assert facts["weights"] == {"bf16": "bfloat16"}.get(weights, weights)
    assert facts["dtype"] == "bfloat16" and facts["model"]["weights"] == "random"
    assert facts["model"]["bytes"] == full if weights == "bf16" else facts["model"]["bytes"] < full
    assert ("linear_low_bit" in facts["backends"]) == (weights != "bf16")


def test_a_folder_is_rounded_and_one_in_few_bits_keeps_its_form(tmp_path):
    rounded = bench_json("--weights", "int8", "--dtype", "float32")
    assert (rounded["weights"], rounded["dtype"]) == ("int8", "float32")
    low_bit = tmp_path / "int8"
    assert run_cli("quantize", TINY_MIXTRAL, low_bit, "--format", "int8").status == 0
    for options in ((), ("--weights", "int8")):
        kept = bench_json(low_bit, *options)
        assert kept["weights"] == "int8" and kept["model"]["weights"] == "checkpoint"
    for other in ("fp8", "bf16"):
        assert_refused(
            refused(low_bit, "--weights", other), f"--weights {other}: those of", "are int8"
        )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--model", "mistral-7b-v9", "--random-weights"), ("--model: name must", "mistral-7b-v0")),
        (("--model", "mixtral-8x7b-v0.1"), ("add --random-weights",)),
        (("folder", "--model", "mixtral-8x7b-v0.1"), ("FOLDER folder exclude each other",)),
        (("--random-weights",), ("--random-weights needs --model",)),
        (("--layers", 1), ("--layers needs --model",)),
        (
            ("--model", "mistral-7b-v0.1", "--random-weights", "--layers", 33),
            ("--layers: expected at most the 32 of mistral-7b-v0.1, got 33",),
        ),
        (
            ("--model", "mistral-7b-v0.1", "--random-weights", "--prompt", 32700, "--new", 100),
            ("--prompt 32700 and --new 100: expected at most the 32768", "got 32800"),
        ),
        (("--prompt", 2**31), ("--prompt 2147483648", "expected at most the 2147483647 tokens")),
        (("--batch", 0), ("--batch", "1")),
        (("--new", 1), ("--new", "2")),
        (("--weights", "int4"), ("--weights int4: ffn_dim: expected a multiple of", "got 320")),
        (("--weights", "bf16", "--dtype", "float32"), ("--weights bf16", "got float32")),
        (("--backend", "metal"), ("metal",)),
        (("--json", "/no/such/folder/out"), ("--json: expected a file", "/no/such/folder/out")),
    ],
)
def test_what_is_refused(arguments, parts):
    assert_refused(refused(*arguments), *parts)


def test_json_does_not_replace_a_pipe_or_a_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert_refused(refused("--json", pipe), "--json: expected a file", f"or -, got {pipe}")
    assert pipe.is_fifo()


def test_a_folder_that_cannot_be_written_is_found_out_before_anything_is_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)  # root may do all
    monkeypatch.setattr(bench, "measure_speed", None)
    assert_refused(refused("--json", tmp_path / "out"), "--json: expected a file in a writable")


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: {"cpu": 1 << 30})
    model = ("--model", "mistral-7b-v0.1", "--random-weights")
    ended = refused(*model, "--weights", "int8")
    assert_refused(
        ended, "cpu has 1.00 GiB of memory free", "7.15 GiB are needed (weights 6.99 GiB", "cache"
    )
    assert_refused(refused("--batch", 20_000), "weights 4.63 MiB", "cache", "working")
    assert_refused(refused("--prompt", 99_999_999), "working 47.7 GiB")


def test_layers_cut_the_windows_too():
    whole = ModelConfig.known("ministral-8b-instruct-2410")
    config = first_layers(whole, 3, "ministral")
    assert (config.layers, config.windows) == (3, (None, 32768, 32768))
