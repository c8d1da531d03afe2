"""Weights in 8 bits are widened on load as transformers does it, in both layouts."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import native_tensors, parameters_of, tiny_config
from released_formats import FP8, quantise, widened
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from mistral_kernels import ModelConfig, Transformer
from mistral_kernels.model import fp8
from mistral_kernels.model.weights import Checkpoint

CONFIG = tiny_config(hidden=32)
GRIDS = [(), (1,), (1, 1), "rows", (4, 2)]
NATIVE = ("qscale_weight", "qscale_act", "params.json", "quantization")
HUGGINGFACE = ("weight_scale_inv", "activation_scale", "config.json", "quantization_config")
SECTIONS = {
    "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": ["lm_head"],
    },
}


def is_quantised(key: str) -> bool:
    return "layers." in key and "norm" not in key


def write(
    folder: Path, layout: tuple[str, ...], grid: tuple | str, *, shards: int = 1
) -> dict[str, Tensor]:
    """Writes a checkpoint in 8 bits; returns its weights widened by transformers, bfloat16."""
    tensors = native_tensors(CONFIG, dtype=torch.bfloat16)
    if layout is HUGGINGFACE:
        tensors = checkpoints.huggingface_tensors(tensors, CONFIG)
    scale_name, activation_name, file, section = layout
    written, wide = {}, dict(tensors)
    for key, tensor in tensors.items():
        written[key] = tensor.contiguous()
        if is_quantised(key):
            stored, scale = quantise(tensor, tensor.shape[:1] if grid == "rows" else grid)
            grid_2d = scale.reshape((*scale.shape, 1, 1)[:2])
            wide[key] = Fp8Dequantize(None)._dequantize_one(stored, grid_2d, torch.bfloat16)
            owner = key.removesuffix("weight")
            written |= {
                key: stored,
                owner + scale_name: scale,
                owner + activation_name: scale.max(),
            }
    writer = checkpoints.write_native if layout is NATIVE else checkpoints.write_huggingface
    writer(folder, CONFIG, written, shards=shards)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | {section: SECTIONS[section]}))
    return wide


def expected_parameters(wide: dict[str, Tensor], layout: tuple[str, ...]) -> dict[str, Tensor]:
    if layout is NATIVE:
        return parameters_of(wide, CONFIG)
    names = checkpoints.huggingface_tensors(
        {key: torch.zeros(CONFIG.head_dim, CONFIG.hidden) for key in native_tensors(CONFIG)}, CONFIG
    )
    back = dict(zip(names, native_tensors(CONFIG), strict=True))
    return parameters_of({back[key]: tensor for key, tensor in wide.items()}, CONFIG)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("layout", [NATIVE, HUGGINGFACE], ids=["native", "huggingface"])
def test_both_layouts(tmp_path: Path, layout: tuple[str, ...], grid: tuple | str) -> None:
    expected = expected_parameters(write(tmp_path, layout, grid), layout)
    model = Transformer.from_folder(tmp_path, device="cpu")
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_scales_in_another_file_than_their_weights(tmp_path: Path) -> None:
    wide = write(tmp_path, NATIVE, "rows", shards=5)
    expected = parameters_of(wide, CONFIG)
    for name, parameter in Transformer.from_folder(tmp_path, device="cpu").named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_wider_dtype_is_not_rounded_on_the_way(tmp_path: Path) -> None:
    write(tmp_path, NATIVE, ())
    model = Transformer.from_folder(tmp_path, device="cpu", dtype=torch.float32)
    wo = native_tensors(CONFIG, dtype=torch.bfloat16)["layers.0.attention.wo.weight"]
    exact = widened(*quantise(wo))
    assert (model.layers[0].attention.wo - exact).abs().max() <= 1e-7 * exact.abs().max()


def test_activation_scales_are_skipped_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, NATIVE, ())
    with caplog.at_level("INFO", logger="mistral_kernels"):
        checkpoint = Checkpoint(tmp_path, ModelConfig.from_folder(tmp_path))
    (record,) = caplog.records
    assert "skipped 14 tensors that scale activations in 8 bits" in record.getMessage()
    assert checkpoint.dtype == torch.bfloat16
    stored = native_tensors(CONFIG, dtype=torch.bfloat16).items()
    assert checkpoint.nbytes == sum(t.numel() * (1 if is_quantised(k) else 2) for k, t in stored)


@pytest.mark.parametrize("grid", [(), (1,), (20,), (4, 3), (20, 6)], ids=str)
@pytest.mark.parametrize("chunk", [5, 36, 1000])
def test_every_scale_against_float64(
    grid: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "CHUNK", chunk)
    stored, scale = quantise(torch.randn(20, 12), grid)
    found = torch.full(stored.shape, torch.nan)
    fp8.dequantise_(found, stored, scale)
    exact = widened(stored, scale)
    assert torch.all((found - exact).abs() <= 2**-24 * exact.abs())


OWNER = "layers.1.attention.wk."


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("qscale_weight", None, "weight: dtype F8_E4M3 without a scale"),
        ("qscale_weight", torch.ones(3), r"qscale_weight: expected one scale, .* got shape \(3,\)"),
        ("qscale_weight", torch.ones(1, 1, 1), r"qscale_weight: .* got shape \(1, 1, 1\)"),
        ("qscale_weight", torch.ones(0), r"qscale_weight: .* got shape \(0,\)"),
        ("qscale_weight", torch.ones(4, 3), r"\(16, 32\), got shape \(4, 3\)"),
        ("qscale_weight", torch.ones((), dtype=torch.int32), "dtype I32 is not supported"),
        ("weight", torch.ones(16, 32), "qscale_weight: scales no weight of dtype F8_E4M3"),
        ("weight", torch.ones(16, 32).to(torch.float8_e5m2), "qscale_weight: scales no weight"),
        ("weight", torch.ones(8, 32).to(FP8), r"weight: expected shape \(16, 32\), got \(8, 32\)"),
    ],
)
def test_refused(tmp_path: Path, key: str, change: Tensor | None, message: str) -> None:
    write(tmp_path, NATIVE, ())
    tensors = load_file(tmp_path / "consolidated.safetensors")
    tensors.pop(OWNER + key)
    if change is not None:
        tensors[OWNER + key] = change
    checkpoints.write_native(tmp_path, CONFIG, tensors)
    with pytest.raises(ValueError, match=f"consolidated.safetensors: {OWNER}.*{message}"):
        Checkpoint(tmp_path, CONFIG)
