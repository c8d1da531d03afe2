"""Adapters of peers keep our ops' conventions: their calls, on stand-ins where a GPU is needed."""

import functools
import importlib
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_prefill_attention, peers
from benchmarks.bench_model import (
    TINY,
    config_of,
    decode_contest,
    prefill_contest,
    random_model,
)
from benchmarks.bench_model import Shape as ModelShape
from benchmarks.peers import packages
from benchmarks.timing import AGREE, OURS, check_agreement, first_results
from mistral_kernels.model import random_weights
from tests import fake_peer_models, fake_peers

BF16 = torch.bfloat16


def uncompiled(monkeypatch) -> None:
    """Leave out what takes half a minute of a compiler, and does not change a result; torch's own
    calls with another backend stay."""
    real = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda call, **how: real(call, **how) if how.keys() - {"mode"} else call,
    )


PLANT = {
    "flash_attn": fake_peers.plant_flash_attn,
    "flash_attn_3": fake_peers.plant_flash_attn,
    "flashinfer": fake_peers.plant_flashinfer,
    "xformers": fake_peer_models.plant_xformers,
    "liger": fake_peer_models.plant_liger,
    "mistral_inference": fake_peer_models.plant_mistral_inference,
    "transformers-compiled": uncompiled,
    "flex_attention": uncompiled,
    "varlen_attn": fake_peers.plant_varlen_attn,
}
# Op -> sizes of its benchmark's shape.
SHAPES = {
    "prefill_attention": [(21, 4, 2, 16, 6), (9, 4, 2, 16, None)],
    "decode_attention": [(2, 4, 2, 16, 7)],
    "rms_norm": [(3, 40)],
    "add_rms_norm": [(3, 40)],
    "rope_": [(5, 4, 2, 16)],
    "silu_mul": [(3, 24)],
}
CASES = [
    (name, op, sizes)
    for name in PLANT
    for op, shapes in SHAPES.items()
    if hasattr(peers.ADAPTERS[name], op)
    for sizes in shapes
]


def contest(name: str, op: str, sizes: tuple, **mistaken) -> None:
    """Compare a peer with our op as the benchmark does; `mistaken`: what the adapter is told."""
    module = importlib.import_module(f"benchmarks.bench_{op.removesuffix('_')}")
    shape, compared = module.Shape(*sizes), []
    call = getattr(peers.ADAPTERS[name], op)(shape._replace(**mistaken), BF16, "cpu")

    def bench(run, make_inputs, work, contestants, **how):
        results, _ = first_results({OURS: run, **contestants}, make_inputs())
        check_agreement(results, AGREE[BF16])
        compared.extend(results)
        return {}

    torch.manual_seed(0)
    test = getattr(module, f"test_{op.removesuffix('_')}")
    test(bench, {name: call}, "cpu", shape, BF16, "reference")
    assert compared == [OURS, name]


@pytest.mark.parametrize(("name", "op", "sizes"), CASES)
def test_a_peer_gives_what_ours_gives(name, op, sizes, monkeypatch):
    PLANT[name](monkeypatch)
    contest(name, op, sizes)


WINDOWED = [case for case in CASES if case[1].endswith("attention") and case[2][-1]]


@pytest.mark.parametrize(("name", "op", "sizes"), WINDOWED)
def test_a_window_off_by_one_is_caught(name, op, sizes, monkeypatch):
    PLANT[name](monkeypatch)
    # A ring has no slot for one key more.
    for window in (sizes[-1] - 1, sizes[-1] + 1)[: 1 if op == "decode_attention" else 2]:
        with pytest.raises(AssertionError):  # by the values, or by a stand-in's contract
            contest(name, op, sizes, window=window)


@pytest.mark.parametrize("size", TINY)
@pytest.mark.parametrize("name", ["mistral_inference", "transformers-compiled"])
def test_an_engine_gives_our_logits(name, size, monkeypatch):
    torch.manual_seed(0)
    PLANT[name](monkeypatch)
    shapes = {"decode": ModelShape(20, 1, *TINY[size]), "prefill": ModelShape(0, 11, *TINY[size])}
    model = random_model(shapes["decode"], torch.float32)
    contests = {"decode": decode_contest, "prefill": prefill_contest}
    for kind, shape in shapes.items():
        engine = peers.ADAPTERS[name].model(shape, torch.float32, "cpu")
        if isinstance(engine, str):
            assert (kind, name) == ("prefill", "transformers-compiled") and "decode only" in engine
            continue
        with torch.inference_mode():
            calls = contests[kind](model, {name: engine}, shape)
            check_agreement(first_results(calls, ())[0], AGREE[torch.float32])


def test_an_engine_has_the_window_of_each_layer():
    torch.manual_seed(0)
    shape = ModelShape(0, 20, *TINY["dense"])
    config = replace(config_of(shape), windows=(8, None))
    model = random_weights.random_model(config, dtype=torch.float32)
    calls = prefill_contest(model, {"transformers": peers.transformers.Engine}, shape)
    with torch.inference_mode():
        check_agreement(first_results(calls, ())[0], AGREE[torch.float32])


def test_reasons_why_a_package_cannot_be_used(monkeypatch, tmp_path):
    missing = functools.partial(packages.missing, needs_cuda=True)
    assert missing("absent_package", device="cuda") == "not installed"
    fake_peers.plant(monkeypatch, some_package={"__version__": "0.2"})
    assert missing("some_package", "some_package:run", device="cpu") == "needs CUDA"
    assert missing("some_package", device="cuda") is None
    reason = missing("some_package", "some_package:run", device="cuda")
    assert reason == "version 0.2 lacks run"
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart: not found\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = missing("broken_package", "broken_package:run", device="cuda")
    assert reason == "does not import: libcudart: not found"
    (tmp_path / "older_package.py").write_text("import torch\ntorch.a_name_that_is_gone")
    reason = missing("older_package", "older_package:run", device="cuda")
    assert reason == "does not import: module 'torch' has no attribute 'a_name_that_is_gone'"


def test_peers_are_found_by_op_and_name(monkeypatch):
    found, reasons = peers.peers_of("prefill_attention", "cpu")
    assert "sdpa" in found and reasons["flex_attention"].startswith("slow to start on cpu")
    assert reasons.keys() >= {"flashinfer", "flash_attn", "flash_attn_3", "xformers"}
    assert not {"liger", "torch"} & (found.keys() | reasons.keys())  # they have no such op
    assert peers.peers_of("prefill_attention", "cpu", ()) == ({}, {})
    assert peers.wanted_peers("all") is None and peers.wanted_peers("none") == set()
    assert peers.wanted_peers("sdpa,liger") == {"sdpa", "liger"}
    with pytest.raises(ValueError, match="got sdpo$"):
        peers.wanted_peers("sdpa,sdpo")
    for name, plant in PLANT.items():
        plant(monkeypatch)
        assert peers.ADAPTERS[name].missing("cuda") is None
        anywhere = hasattr(peers.ADAPTERS[name], "SLOW_ON")
        assert peers.ADAPTERS[name].missing("cpu") == (None if anywhere else "needs CUDA")


def test_what_is_slow_to_start_runs_on_request():
    name = "transformers-compiled"
    found, reasons = peers.peers_of("model", "cpu")
    assert name not in found and reasons[name].startswith("slow to start")
    assert name in peers.peers_of("model", "cpu", (name,))[0]


def test_an_adapter_may_refuse_a_shape(monkeypatch):
    fake_peers.plant_flash_attn(monkeypatch)
    shape = bench_prefill_attention.Shape(9, 4, 2, 16, 4)
    call = ("prefill_attention", shape, torch.float32, "cuda", ("flash_attn",))
    assert peers.calls_of(*call) == ({}, {"flash_attn": "takes no float32"})


def test_an_adapter_that_fails_says_so(monkeypatch):
    def broken(shape, dtype, device):
        raise RuntimeError("nvcc: not found\nmore")

    monkeypatch.setattr(peers.sdpa, "prefill_attention", broken)
    call = ("prefill_attention", None, BF16, "cpu", ("sdpa",))
    assert peers.calls_of(*call) == ({}, {"sdpa": "failed: nvcc: not found"})


def test_an_engine_that_cannot_be_made_is_a_call_that_fails():
    def broken(model):
        raise RuntimeError("out of memory\nmore")

    shape = ModelShape(20, 1, *TINY["dense"])
    model = random_model(shape, torch.float32)
    for contest in (decode_contest, prefill_contest):
        calls = contest(model, {"broken": broken}, shape)
        results, failed = first_results(calls, (), {"broken"})
        assert (results.keys(), failed) == ({OURS}, {"broken": "failed: out of memory"})
        with pytest.raises(RuntimeError, match="out of memory"):
            first_results(calls, ())
