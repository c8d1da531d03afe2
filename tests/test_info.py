"""`mistral-kernels info FOLDER`: its numbers are the model's, and nothing stops it telling them."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import (
    native_params,
    native_tensors,
    tiny_config,
    write_huggingface,
    write_native,
)
from command_line import assert_refused, run_cli
from tiny_models import random_model

from mistral_kernels import ModelConfig, Transformer, checkpoint_info, free_memory
from mistral_kernels.checkpoint_info import collect_checkpoint
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.step_graphs import graph_bytes
from mistral_kernels.ops import dispatch

MODELS = [
    {},
    {"tied_embeddings": True},
    {"experts": 4, "top_k": 2},
    {"layers": 3, "windows": (None, 20, 40), "max_positions": 100},
]


def info_json(folder: Path, *options: str) -> dict:
    ended = run_cli("info", folder, "--json", *options)
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_the_loaded_model(tmp_path, changes, dtype):
    write_native(tmp_path, tiny_config(**changes), dtype=dtype)
    facts, model = collect_checkpoint(tmp_path), Transformer.from_folder(tmp_path, device="cpu")
    parameters = list(model.parameters())
    assert facts["problem"] is None
    assert facts["parameters"]["total"] == sum(p.numel() for p in parameters)
    assert facts["bytes"] == sum(p.nbytes for p in parameters) == facts["memory"]["cpu"]["weights"]
    parts = facts["parts"].values()
    assert sum(part["parameters"] for part in parts) == facts["parameters"]["total"]
    assert sum(part["bytes"] for part in parts) == facts["bytes"]
    assert facts["dtype"] == str(dtype).removeprefix("torch.")
    for tokens, size in facts["cache"]["bytes"].items():
        assert size == model.new_cache(1, tokens).nbytes
    filled = model.new_cache(1, 16).nbytes
    assert facts["cache"]["bytes_per_token"] * 16 == filled
    assert facts["ops"]["cpu"] == model.backends


def test_parts_of_a_mixture_of_experts(tmp_path):
    config = tiny_config(experts=4, top_k=2)
    write_native(tmp_path, config)
    facts = collect_checkpoint(tmp_path)
    expert = 3 * 24 * 40  # w1, w2 and w3: hidden x ffn_dim
    assert {part: sizes["parameters"] for part, sizes in facts["parts"].items()} == {
        "embedding": 32 * 24,
        "norms": 5 * 24,
        "attention": 2 * (4 + 2 + 2 + 4) * 8 * 24,
        "router": 2 * 4 * 24,
        "experts": 2 * 4 * expert,
        "output": 32 * 24,
    }
    idle = 2 * (4 - 2) * expert
    assert facts["parameters"]["total"] - facts["parameters"]["active"] == idle


@pytest.mark.parametrize("write", [write_native, write_huggingface])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout(tmp_path, write, shards):
    tensors = write(tmp_path, tiny_config(), dtype=torch.bfloat16, shards=shards)
    (tmp_path / "lora.safetensors").write_bytes(b"an adapter is no part of the weights")
    facts = info_json(tmp_path)
    assert facts["layout"] == write.__name__.removeprefix("write_")
    assert (facts["name"], facts["problem"], facts["dtype"]) == (tmp_path.name, None, "bfloat16")
    on_disk = {p.name: p.stat().st_size for p in tmp_path.glob("[cm]*.safetensors")}
    assert facts["files"] == on_disk and len(on_disk) == shards
    assert facts["stored"] == {"BF16": sum(t.numel() for t in tensors.values())}


def test_both_layouts_and_the_option(tmp_path):
    write_native(tmp_path, tiny_config())
    write_huggingface(tmp_path, tiny_config())
    assert info_json(tmp_path)["layout"] == "native"
    facts = info_json(tmp_path, "--layout", "huggingface")
    assert facts["layout"] == "huggingface" and list(facts["files"]) == ["model.safetensors"]


def test_a_published_model_without_its_weights(tmp_path):
    """2 x 32 layers x 8 heads x 128 x 2 bytes a token; windows of 4096 hold 512 MiB at most."""
    folder = tmp_path / "Mistral-7B-Instruct-v0.1"
    folder.mkdir()
    params = native_params(ModelConfig.known("mistral-7b-v0.1")) | {"max_seq_len": 32768}
    (folder / "params.json").write_text(json.dumps(params))
    facts = info_json(folder)
    assert facts["family"] == "mistral-7b-v0.1" and facts["chat_model"]
    assert facts["parameters"] == {"total": 7_241_732_096, "active": 7_241_732_096}
    assert (facts["dtype"], facts["bytes"]) == ("bfloat16", 2 * 7_241_732_096)
    assert facts["cache"] == {
        "bytes_per_token": 128 * 2**10,
        "bytes": {"4096": 512 * 2**20, "32768": 512 * 2**20},
    }
    assert "consolidated" in facts["problem"] and facts["files"] == {}
    shown = run_cli("info", folder).out
    for part in ("mistral-7b-v0.1", "7,241,732,096", "none here", "128 KiB", "window of 4096 full"):
        assert part in shown


def test_whether_it_fits(tmp_path, monkeypatch):
    write_native(tmp_path, tiny_config())
    needed = collect_checkpoint(tmp_path)["memory"]["cpu"]
    assert needed["needed"] == needed["weights"] + needed["cache"] + needed["working"]
    for spare, verdict in ((-3 * 2**10, "no, 3.00 KiB short"), (0, "yes")):
        free = {"cpu": needed["needed"] + spare}
        monkeypatch.setattr(checkpoint_info, "free_memory", lambda free=free: free)
        assert collect_checkpoint(tmp_path)["memory"]["cpu"]["short"] == max(-spare, 0)
        assert verdict in run_cli("info", tmp_path).out
    monkeypatch.setattr(checkpoint_info, "free_memory", lambda: {"cpu": None})
    assert "not known" in run_cli("info", tmp_path).out


def test_graphs_are_counted_where_a_gpu_replays_them(tmp_path, monkeypatch):
    write_native(tmp_path, tiny_config(max_positions=9000), dtype=torch.bfloat16)
    monkeypatch.setattr(checkpoint_info, "free_memory", lambda: {"cpu": 2**40, "cuda:0": 2**40})
    monkeypatch.setattr(dispatch, "device_capability", lambda device: (9, 0))
    for gpu, graphs in ((True, graph_bytes(tiny_config(), torch.bfloat16, 1)), (False, 0)):
        monkeypatch.setattr(
            dispatch, "unavailable", lambda name, gpu=gpu: None if gpu else name != "reference"
        )
        dispatch.choose.cache_clear()
        needs = collect_checkpoint(tmp_path)["memory"]
        assert (needs["cpu"]["prompt"], needs["cuda:0"]["prompt"]) == (2048, 8192)
        assert (needs["cpu"]["graphs"], needs["cuda:0"]["graphs"]) == (0, graphs)
        parts = ("weights", "cache", "working", "graphs")
        assert needs["cuda:0"]["needed"] == sum(needs["cuda:0"][part] for part in parts)
        assert (" graphs " in run_cli("info", tmp_path).out) == gpu
    monkeypatch.undo()
    dispatch.choose.cache_clear()


def test_free_memory(tmp_path):
    assert 0 < free_memory.free_memory()["cpu"] < 2**50
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemFree: 5 kB\nMemAvailable:     300 kB\n")
    assert free_memory._main_memory(meminfo, tmp_path) == 300 * 1024
    (tmp_path / "memory.stat").write_text("file 7000\nanon 50000\n")
    for limit, left in (("max", 300 * 1024), ("90000", 40000), ("900000", 300 * 1024)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free_memory._main_memory(meminfo, tmp_path) == left


def test_the_embedded_model():
    facts = info_json(TINY_MIXTRAL)
    assert facts["tokenizer"]["version"] == "v1" and facts["tokenizer"]["vocab"] == 2048
    assert facts["tokenizer"]["problem"] is None and not facts["chat_model"]
    shown = run_cli("info", TINY_MIXTRAL).out
    for part in ("tokenizer.model.v1", "64 x 4", "1,444,992 active", "decode_attention", "MiB"):
        assert part in shown


def corrupt(folder: Path, **params: object) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | params))


@pytest.mark.parametrize(
    "spoil, part",
    [
        (lambda folder: corrupt(folder, kv_lora_rank=512), "MLA"),
        (lambda folder: corrupt(folder, quantization={"qformat_weight": "odd"}), "quantization"),
        (lambda folder: corrupt(folder, n_layers=0), "n_layers"),
        (lambda folder: (folder / "params.json").write_text("{"), "not valid JSON"),
    ],
)
def test_models_that_are_not_supported(tmp_path, spoil, part):
    tensors = write_native(tmp_path, tiny_config())
    spoil(tmp_path)
    facts = info_json(tmp_path)
    assert part in facts["problem"] and "params.json" in facts["problem"]
    assert facts["parameters"] is facts["memory"] is None
    assert facts["stored"] == {"F32": sum(t.numel() for t in tensors.values())}
    shown = run_cli("info", tmp_path)
    assert shown.status == 0 and "cannot be loaded" in shown.out


def test_weights_that_cannot_be_read(tmp_path):
    write_native(tmp_path, tiny_config())
    weights = tmp_path / "consolidated.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    facts = info_json(tmp_path)
    assert "consolidated.safetensors: truncated" in facts["problem"] and facts["stored"] is None
    assert facts["parameters"]["total"] == sum(p.numel() for p in random_model().parameters())
    weights.rename(tmp_path / "consolidated.00.pth")
    facts = info_json(tmp_path)
    assert "pickle" in facts["problem"] and list(facts["files"]) == ["consolidated.00.pth"]


def test_links_that_lead_nowhere(tmp_path):
    write_native(tmp_path, tiny_config(), shards=2)
    lost = "consolidated-00001-of-00002.safetensors"
    (tmp_path / lost).unlink()
    (tmp_path / lost).symlink_to("nowhere")
    facts = info_json(tmp_path)
    assert lost in facts["problem"] and list(facts["files"]) == [lost.replace("1-of", "2-of")]


def test_weights_in_8_bits_without_their_scale(tmp_path):
    tensors, key = native_tensors(tiny_config()), "layers.0.attention.wq.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    write_native(tmp_path, tiny_config(), tensors)
    facts = info_json(tmp_path)
    assert key in facts["problem"] and facts["dtype"] == "float32"
    assert facts["stored"]["F8_E4M3"] == tensors[key].numel()


def test_tokenizers_that_are_missing_or_too_large(tmp_path):
    write_native(tmp_path, tiny_config())
    assert "no tokenizer" in info_json(tmp_path)["tokenizer"]["problem"]
    name = "tokenizer.model.v1"
    (tmp_path / name).write_bytes((TINY_MIXTRAL / name).read_bytes())
    tokenizer = info_json(tmp_path)["tokenizer"]
    assert "2048 tokens do not fit" in tokenizer["problem"] and tokenizer["file"] == name
    assert "tokenizer problem" in run_cli("info", tmp_path).out


@pytest.mark.parametrize("name, part", [("none", "no such folder"), ("file", "got a file")])
def test_input_that_is_no_checkpoint(tmp_path, name, part):
    (tmp_path / "file").touch()
    assert_refused(run_cli("info", tmp_path / name), str(tmp_path / name), part)
    assert_refused(run_cli("info", tmp_path), "holds no params.json nor config.json")
    assert_refused(run_cli("info", tmp_path, "--layout", "odd"), "--layout", "odd")
