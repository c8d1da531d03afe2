"""Folders that are damaged, incomplete, mixed up or closed are refused by file and key."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
import torch
from released_formats import write_bins, write_pickles

from mistral_kernels import Transformer

CONFIG = checkpoints.tiny_config()
NATIVE = checkpoints.native_tensors(CONFIG)
HUGGINGFACE = {
    key: tensor.contiguous()
    for key, tensor in checkpoints.huggingface_tensors(NATIVE, CONFIG).items()
}
NOBODY = 65534


def refused(
    folder: Path, message: str, error: type[Exception] = ValueError, *, allow_pickle: bool = True
) -> None:
    with pytest.raises(error, match=message):
        Transformer.from_folder(folder, device="cpu", allow_pickle=allow_pickle)


def test_missing_native_shard(tmp_path: Path) -> None:
    checkpoints.write_native(tmp_path, CONFIG, shards=4)
    name = "consolidated-00003-of-00004.safetensors"
    (tmp_path / name).unlink()
    message = f"{name}: missing, with 3 of 4 shards there$"
    refused(tmp_path, message, FileNotFoundError)
    # What huggingface_hub leaves of a download that was cut.
    cache = tmp_path / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / f"{name}.0a1b.incomplete").write_bytes(b"")
    refused(tmp_path, "a download is not finished, .*0a1b.incomplete is left", FileNotFoundError)


def test_shards_of_two_sets(tmp_path: Path) -> None:
    checkpoints.write_native(tmp_path, CONFIG, shards=2)
    checkpoints.write_native(tmp_path, CONFIG, shards=3)
    message = "00001-of-00003.safetensors: not a shard of one set with consolidated-00001-of-00002"
    refused(tmp_path, message)


def test_shard_without_a_number(tmp_path: Path) -> None:
    checkpoints.write_native(tmp_path, CONFIG, shards=2)
    (tmp_path / "consolidated-last-of-00002.safetensors").write_bytes(b"")
    refused(tmp_path, "consolidated-last-of-00002.safetensors: not a shard of one set")


def test_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    checkpoints.write_huggingface(tmp_path, CONFIG, shards=3)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.rename(f"{path}.incomplete")
    message = f"^{re.escape(str(path))}: no such file, but model.safetensors.index.json names it"
    refused(tmp_path, f"{message}; a download is not finished", FileNotFoundError)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_without_their_index(tmp_path: Path, kind: str) -> None:
    if kind == "pytorch_model.bin":
        write_bins(tmp_path, CONFIG, HUGGINGFACE, files=2)
    else:
        checkpoints.write_huggingface(tmp_path, CONFIG, shards=2)
    (tmp_path / f"{kind}.index.json").unlink()
    message = rf"{kind}.index.json: missing beside \w+-00001-of-00002"
    refused(tmp_path, message, FileNotFoundError)


def test_missing_pickle_of_several(tmp_path: Path) -> None:
    write_pickles(tmp_path, CONFIG, NATIVE, files=3)
    (tmp_path / "consolidated.01.pth").unlink()
    message = "consolidated.01.pth: missing beside consolidated.02.pth"
    refused(tmp_path, message, FileNotFoundError)


def test_leftovers_of_a_download_beside_a_whole_checkpoint(tmp_path: Path) -> None:
    checkpoints.write_native(tmp_path, CONFIG)
    (tmp_path / "consolidated.safetensors.0a1b.incomplete").write_bytes(b"half")
    (tmp_path / "consolidated.00.pth.incomplete").write_bytes(b"half")
    Transformer.from_folder(tmp_path, device="cpu")


def test_only_half_a_download(tmp_path: Path) -> None:
    checkpoints.write_native(tmp_path, CONFIG)
    file = tmp_path / "consolidated.safetensors"
    file.rename(f"{file}.0a1b.incomplete")
    refused(tmp_path, r"holds no consolidated\*.safetensors; a download is not", FileNotFoundError)


def test_names_of_the_other_layout(tmp_path: Path) -> None:
    checkpoints.write_native(tmp_path / "native", CONFIG, HUGGINGFACE)
    refused(tmp_path / "native", r"consolidated.safetensors: \S+: not a tensor of this model")
    checkpoints.write_huggingface(tmp_path / "huggingface", CONFIG, NATIVE)
    refused(tmp_path / "huggingface", r"model.safetensors: \S+: not a tensor of this model")
    both = {key: tensor.clone() for key, tensor in (NATIVE | HUGGINGFACE).items()}
    checkpoints.write_native(tmp_path / "both", CONFIG, both)
    refused(tmp_path / "both", r"(model|lm_head)\.\S+: not a tensor of this model")


@pytest.mark.parametrize("key", ["tok_embeddings.weight", "output.weight"])
def test_vocabulary_of_another_size(tmp_path: Path, key: str) -> None:
    padded = torch.cat((NATIVE[key], torch.zeros(8, CONFIG.hidden)))
    checkpoints.write_native(tmp_path, CONFIG, NATIVE | {key: padded})
    refused(tmp_path, rf"{key}: expected shape \(32, 24\), got \(40, 24\)")


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """A folder whose permissions count: root may read anything, so root becomes nobody here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        if os.geteuid():
            yield folder
            return
        os.chown(name, NOBODY, -1)
        try:
            os.seteuid(NOBODY)
        except OSError as error:
            pytest.skip(f"root cannot become another user here: {error}")
        yield folder
        os.seteuid(0)


@pytest.mark.parametrize("closed", [".", "params.json", "consolidated.safetensors"])
def test_no_permission_to_read(own_folder: Path, closed: str) -> None:
    checkpoints.write_native(own_folder, CONFIG)
    (own_folder / closed).chmod(0)
    name = "params.json" if closed == "." else closed
    with pytest.raises(PermissionError) as caught:
        Transformer.from_folder(own_folder, device="cpu")
    assert str(own_folder / name) in str(caught.value)
    own_folder.chmod(0o700)
