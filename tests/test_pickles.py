"""Pickles are read only if allowed, run no code, and are refused unless they hold tensors."""

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from released_formats import write_bins, write_pickles

from mistral_kernels import Transformer
from mistral_kernels.model.pickles import load_pickle

CONFIG = checkpoints.tiny_config()
TENSORS = checkpoints.native_tensors(CONFIG)


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        load_pickle(path)


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("write", [write_pickles, write_bins])
def test_only_if_allowed(tmp_path: Path, write: Callable, files: int) -> None:
    write(tmp_path, CONFIG, TENSORS, files=files)
    first = next(path for path in sorted(tmp_path.iterdir()) if path.suffix in (".pth", ".bin"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(first))}: a pickle.* allow_pickle=True"):
        Transformer.from_folder(tmp_path, device="cpu")


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return Path.write_text, (self.proof, "ran")


@pytest.mark.parametrize("place", ["instead", "beside"])
def test_code_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / "consolidated.00.pth"
    write_pickles(tmp_path, CONFIG, TENSORS)
    torch.save(Code(proof) if place == "instead" else TENSORS | {"x": Code(proof)}, path)
    with pytest.raises(ValueError, match=r"consolidated.00.pth: damaged.*Unsupported.*\)$"):
        Transformer.from_folder(tmp_path, device="cpu", allow_pickle=True)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file does hold code"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": torch.ones(25)}, r"norm.weight: expected shape \(24,\), got \(25,\)"),
        ({"norm.weight": torch.ones(24).int()}, "norm.weight: dtype I32 is not supported"),
        ({"extra.weight": torch.ones(24)}, "extra.weight: not a tensor of this model"),
        ({"norm.weight": [1.0] * 24}, "norm.weight: expected a tensor, got list"),
        ({"norm.weight": torch.ones(24).to_sparse()}, "norm.weight: expected a tensor"),
        ({"norm.weight": torch.ones(24, device="meta")}, "norm.weight: expected a tensor"),
        ({7: torch.ones(24)}, "expected names of tensors, got 7"),
    ],
)
def test_contents(tmp_path: Path, change: dict, message: str) -> None:
    write_pickles(tmp_path, CONFIG, TENSORS | change)
    with pytest.raises(ValueError, match=f"consolidated.00.pth: {message}"):
        Transformer.from_folder(tmp_path, device="cpu", allow_pickle=True)


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], {"model": TENSORS}])
def test_no_dict_of_tensors(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "file.pth")
    refused(tmp_path / "file.pth", "(model: )?expected a (dict of tensors|tensor), got ")


@pytest.mark.parametrize("keep", [0, 10, 3000, -100, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "file.pth"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "truncated, or not a zip file")


def test_pickle_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(pickle.dumps({"norm.weight": 1.0}))
    refused(path, "truncated, or not a zip file")
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)  # as torch before 1.6
    refused(path, "truncated, or not a zip file")


@pytest.mark.parametrize(
    "opcodes", [b"", b"N", b".", b"(.", b"}q", b"\x80\x02]q\x00K", b"c", b"\x80\x02h\x05.", b"K"]
)
def test_malformed_opcodes(tmp_path: Path, opcodes: bytes) -> None:
    path = tmp_path / "file.pth"
    torch.save({"norm.weight": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, opcodes if name.endswith("data.pkl") else content)
    refused(path, "")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="file.pth: no such file"):
        load_pickle(tmp_path / "file.pth")
