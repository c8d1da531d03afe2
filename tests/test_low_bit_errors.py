"""Low-bit checkpoints that are refused, file and key named, nearly all before memory is taken."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import low_bit_folders
import pytest
import torch
from low_bit_folders import AWQ, DENSE, GPTQ, KINDS, compressed
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_kernels import Transformer
from mistral_kernels.model.weights import Checkpoint

OWNER = "layers.1.attention.wk."
FILE = "consolidated.safetensors"
GROUPS = {"strategy": "group", "group_size": 32}


def gone(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(OWNER + name)


def other(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({OWNER + name: change(tensors[OWNER + name])})


def added(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({OWNER + name: tensor})


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([0]), value)


TENSORS = [
    ("awq", gone("qweight"), "qweight: missing"),
    ("awq", gone("scales"), "scales: missing"),
    ("awq", gone("qzeros"), "qzeros: missing"),
    ("awq", added("g_idx", torch.zeros(64)), "g_idx: not a tensor of awq, 4 bits, groups of 32"),
    ("awq", added("bias", torch.zeros(32)), "bias: not a tensor of this model"),
    (
        "awq",
        other("qweight", lambda t: t[:-8]),
        r"qweight: expected shape \(64, 4\), got \(56, 4\)",
    ),
    ("awq", other("scales", Tensor.double), "scales: expected dtype F32 .* got F64"),
    ("awq", other("qzeros", Tensor.long), "qzeros: expected dtype I32 .* got I64"),
    ("gptq", gone("qzeros"), "qzeros: missing"),
    ("gptq", other("bias", lambda t: t + 1), "bias: biases are not supported"),
    ("gptq-act-order", gone("g_idx"), "g_idx: missing"),
    ("gptq-act-order", other("g_idx", filled(2)), "g_idx: expected groups from 0 to 1, got 0 to 2"),
    ("gptq-act-order", other("g_idx", filled(-1)), "g_idx: expected groups from 0 to 1, got -1"),
    (
        "gptq-act-order",
        other("g_idx", lambda t: torch.zeros_like(t)),
        "g_idx: expected 32 columns in each group, got 64 in group 0",
    ),
    ("packed", gone("weight_scale"), "weight_scale: missing"),
    ("packed", gone("weight_packed"), "weight_packed: missing"),
    (
        "packed",
        other("weight_shape", lambda t: t + 1),
        r"shape: expected \(32, 64\), got \(33, 65\)",
    ),
    ("packed-zeros", gone("weight_zero_point"), "weight_zero_point: missing"),
    ("packed-act-order", gone("weight_g_idx"), "weight_g_idx: missing"),
    ("int8-rows", other("weight", Tensor.float), "weight: expected dtype I8 for .* got F32"),
    ("int8-zeros", other("weight_zero_point", lambda t: t[:, :1].clone()), "zero_point: expected"),
    (
        "fp8-blocks",
        other("weight_scale", lambda t: t[:1].clone()),
        r"weight_scale: .*\(2, 2\) scal",
    ),
    ("fp8-rows", other("weight", lambda t: t.to(torch.float8_e5m2)), "weight: .* got F8_E5M2"),
    ("packed", added("weight", torch.zeros(32, 64)), "weight: not a tensor of compressed-tensors"),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSORS)
def test_tensors(tmp_path: Path, name: str, change: Callable, message: str) -> None:
    low_bit_folders.write(tmp_path, DENSE, KINDS[name])
    path = tmp_path / "low" / FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {re.escape(OWNER)}.*{message}"):
        Checkpoint(tmp_path / "low", DENSE)


@pytest.mark.parametrize(
    ("kind", "section", "message"),
    [
        ("awq", None, "qweight: not a tensor of plain weights, as params.json describes them"),
        ("fp8-rows", None, "weight_scale: not a tensor of plain weights"),
        ("awq", GPTQ, "qweight: expected shape"),
        ("packed", AWQ, "weight_.*: not a tensor of awq"),
        ("awq", AWQ | {"group_size": 48}, "64 columns are not a multiple of group_size 48"),
        (
            "packed",
            compressed("pack-quantized", strategy="group", group_size=48),
            "not a multiple of group_size 48",
        ),
        ("awq", AWQ | {"group_size": 64}, r"expected shape \(1, \d+\), got \(2, \d+\)"),
        (
            "packed",
            compressed("pack-quantized", num_bits=8, **GROUPS),
            r"packed: expected shape \(.*, 16\)",
        ),
        (
            "packed",
            compressed("pack-quantized", symmetric=False, **GROUPS),
            "weight_zero_point: missing",
        ),
    ],
)
def test_files_that_contradict_their_configuration(
    tmp_path: Path, kind: str, section: dict | None, message: str
) -> None:
    low_bit_folders.write(tmp_path, DENSE, KINDS[kind])
    path = tmp_path / "low" / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": section}))
    with pytest.raises(ValueError, match=f"{FILE}: layers.*{message}"):
        Checkpoint(tmp_path / "low", DENSE)


def test_plain_weights_that_are_called_quantised(tmp_path: Path) -> None:
    low_bit_folders.write(tmp_path, DENSE, KINDS["awq"], ignored=lambda key: True)
    with pytest.raises(ValueError, match=r"params.json: says awq.*, but no weight is quantised"):
        Checkpoint(tmp_path / "low", DENSE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite(tmp_path: Path, value: float) -> None:
    low_bit_folders.write(tmp_path, DENSE, KINDS["awq"])
    path = tmp_path / "low" / FILE
    tensors = load_file(path)
    tensors[OWNER + "scales"][1, 3] = value
    save_file(tensors, path)
    for dequantise in (True, False):
        with pytest.raises(ValueError, match=f"{FILE}: {OWNER}scales: holds values that are not"):
            Transformer.from_folder(tmp_path / "low", device="cpu", dequantise=dequantise)


def test_codes_that_are_nan(tmp_path: Path) -> None:
    low_bit_folders.write(tmp_path, DENSE, KINDS["fp8-rows"])
    path = tmp_path / "low" / FILE
    tensors = load_file(path)
    tensors[OWNER + "weight"][1, 3] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{FILE}: {OWNER}weight: holds codes that are NaN"):
        Transformer.from_folder(tmp_path / "low", device="cpu")


@pytest.mark.parametrize(
    ("name", "section", "zeros"),
    [
        ("awq", AWQ | {"zero_point": False}, "qzeros"),
        ("gptq", GPTQ | {"sym": True}, "qzeros"),
        ("packed-zeros", compressed("pack-quantized", **GROUPS), "weight_zero_point"),
        (
            "int8-zeros",
            compressed("int-quantized", num_bits=8, **GROUPS),
            "weight_zero_point",
        ),
    ],
)
def test_zeros_of_a_format_that_is_called_symmetric(
    tmp_path: Path, name: str, section: dict, zeros: str
) -> None:
    low_bit_folders.write(tmp_path, DENSE, KINDS[name])
    path = tmp_path / "low" / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": section}))
    with pytest.raises(ValueError, match=f"{FILE}: .*{zeros}: expected the zeros of a symmetric"):
        Transformer.from_folder(tmp_path / "low", device="cpu")


@pytest.mark.parametrize("name", ["int8-rows", "fp8-rows"])
def test_zeros_beside_symmetric_codes(tmp_path: Path, name: str) -> None:
    """Old compressed-tensors wrote them; they are not kept, and must be zero."""
    low_bit_folders.write(tmp_path, DENSE, KINDS[name])
    path = tmp_path / "low" / FILE
    tensors = load_file(path)
    scale = tensors[OWNER + "weight_scale"]
    tensors[OWNER + "weight_zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
    save_file(tensors, path)
    model = Transformer.from_folder(tmp_path / "low", device="cpu")
    assert model.layers[1].attention.wqkv.tensors.zeros is None
    tensors[OWNER + "weight_zero_point"][0] = 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{FILE}: {OWNER}weight_zero_point: expected the zeros"):
        Transformer.from_folder(tmp_path / "low", device="cpu")
