"""Checkpoints that are refused, file and key named, before a parameter exists or is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_kernels.model.weights import Checkpoint, parameter_shapes

CONFIG = checkpoints.tiny_config()
HUGGINGFACE = checkpoints.tiny_config(interleaved=False)
WQ = "layers.1.attention.wq.weight"


def refused(folder: Path, message: str, layout: str = "native") -> None:
    config = CONFIG if layout == "native" else HUGGINGFACE
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder, config)


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.pop(key)


def changed(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: change(tensors.get(key, torch.zeros(2, 3)))})


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (without(WQ), f"{WQ}: missing$"),
        (without("output.weight"), "output.weight: missing$"),
        (
            lambda tensors: [tensors.pop(k) for k in list(tensors)[:3]],
            "missing, and so are 2 others",
        ),
        (changed(WQ, lambda t: t[:-1]), rf"{WQ}: expected shape \(32, 24\), got \(31, 24\)"),
        (
            changed("norm.weight", lambda t: t[None]),
            r"norm.weight: expected shape \(24,\), got \(1, ",
        ),
        (changed("norm.weight", torch.Tensor.int), "norm.weight: dtype I32 is not supported$"),
        (
            changed(WQ, lambda t: t.to(torch.float8_e4m3fn)),
            f"{WQ}: dtype F8_E4M3 is not supported",
        ),
        (
            changed("layers.2.attention_norm.weight", lambda t: t),
            "layers.2.attention_norm.weight: not",
        ),
        (changed("layers.0.attention.wq.bias", lambda t: t), "layers.0.attention.wq.bias: not a"),
        (
            changed("model.norm.weight", lambda t: t),
            "model.norm.weight: not a tensor of this model",
        ),
    ],
)
def test_tensors(tmp_path: Path, mutate: Callable, message: str) -> None:
    tensors = checkpoints.native_tensors(CONFIG)
    mutate(tensors)
    checkpoints.write_native(tmp_path, CONFIG, tensors)
    file = re.escape(str(tmp_path / "consolidated.safetensors"))
    refused(tmp_path, f"^{file}: .*{message}")


@pytest.mark.parametrize("keep", [0, 7, 100, -1], ids=["empty", "size", "header", "last-byte"])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    checkpoints.write_native(tmp_path, CONFIG, shards=2)
    path = tmp_path / "consolidated-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, f"^{re.escape(str(path))}: truncated or not a safetensors file")


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_bytes(b"\x80\x04pickled" * 100)
    refused(tmp_path, "consolidated.safetensors: truncated or not a safetensors file")


def test_key_in_two_shards(tmp_path: Path) -> None:
    checkpoints.write_native(tmp_path, CONFIG, shards=2)
    extra = tmp_path / "consolidated-00002-of-00002.safetensors"
    save_file({"tok_embeddings.weight": torch.ones(CONFIG.hidden)}, extra)
    message = "tok_embeddings.weight: also in consolidated-00001-of-00002.safetensors"
    refused(tmp_path, f"^{re.escape(str(extra))}: {message}")


def test_key_under_two_prefixes(tmp_path: Path) -> None:
    tensors = checkpoints.write_huggingface(tmp_path, CONFIG)
    again = {"language_model.model.norm.weight": tensors["model.norm.weight"].clone()}
    checkpoints.write_huggingface(tmp_path, CONFIG, tensors | again)
    refused(tmp_path, "norm.weight: stored twice", layout="huggingface")


def test_missing_shard(tmp_path: Path) -> None:
    checkpoints.write_huggingface(tmp_path, CONFIG, shards=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))}: no such file"):
        Checkpoint(tmp_path, HUGGINGFACE)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors"]
    + ["c:model.safetensors", "..", "model.bin", "", "model.safetensors\0", 3, None],
)
def test_index_that_leads_elsewhere(tmp_path: Path, name: object) -> None:
    checkpoints.write_huggingface(tmp_path / "folder", CONFIG, shards=2)
    checkpoints.write_huggingface(tmp_path, CONFIG)
    index = tmp_path / "folder" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(values))
    message = "model.norm.weight: expected the name of a .safetensors file in the folder"
    refused(tmp_path / "folder", f"^{re.escape(str(index))}: {message}", layout="huggingface")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_malformed_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "index.json: (not valid JSON|weight_map: expected)", layout="huggingface")


def test_links_are_followed(tmp_path: Path) -> None:
    checkpoints.write_huggingface(tmp_path / "blobs", CONFIG, shards=2)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert Checkpoint(tmp_path / "snapshot", HUGGINGFACE).dtype == torch.float32


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no consolidated"):
        Checkpoint(tmp_path, CONFIG)
    with pytest.raises(NotADirectoryError, match="expected a checkpoint folder"):
        Checkpoint(tmp_path / "none", CONFIG)
    with pytest.raises(ValueError, match="layout: expected 'native' as in config"):
        Checkpoint(tmp_path, CONFIG, layout="huggingface")


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("norm", None, "norm: missing"),
        ("layers.2.ffn_norm", torch.zeros(24), "layers.2.ffn_norm: not a parameter"),
        ("norm", torch.zeros(25), r"norm: expected shape \(24,\), got \(25,\)"),
        ("norm", torch.zeros(24, device="meta"), "norm: expected memory, got a meta tensor"),
    ],
)
def test_parameters_of_another_model_are_left_alone(
    tmp_path: Path, name: str, parameter: Tensor | None, message: str
) -> None:
    checkpoints.write_native(tmp_path, CONFIG)
    parameters = {key: torch.zeros(shape) for key, shape in parameter_shapes(CONFIG).items()}
    parameters.pop(name, None)
    if parameter is not None:
        parameters[name] = parameter
    with pytest.raises(ValueError, match=f"parameters: {message}"):
        Checkpoint(tmp_path, CONFIG).copy_to(parameters)
    assert not any(tensor.any() for tensor in parameters.values() if not tensor.is_meta)
