"""FP8 weights become what transformers makes of them, in both layouts, kept or widened."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import native_tensors, parameters_of, tiny_config
from released_formats import FP8, quantise, widened
from safetensors.torch import load_file, save_file
from tolerance import assert_same
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from mistral_kernels import ModelConfig, Transformer
from mistral_kernels.model import stored_low_bit
from mistral_kernels.model.weights import Checkpoint

CONFIG = tiny_config(hidden=32, ffn_dim=64)
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
    model = Transformer.from_folder(tmp_path, device="cpu", dequantise=True)
    assert model.dtype == torch.bfloat16 and model.quantisation is None
    for name, parameter in model.named_parameters():
        assert_same(parameter, expected[name], name)
    kept = Transformer.from_folder(tmp_path, device="cpu")
    assert kept.quantisation == "fp8, FP8" and kept.dtype == torch.bfloat16
    for name, expected_weight in expected.items():
        if is_quantised(name) and "gate" not in name:
            held = kept.get_submodule(name).tensors
            assert held.qweight.dtype == FP8
            assert_same(held.dequantise(torch.bfloat16), expected_weight, name)


def test_scales_in_another_file_than_their_weights(tmp_path: Path) -> None:
    wide = write(tmp_path, NATIVE, "rows", shards=5)
    expected = parameters_of(wide, CONFIG)
    model = Transformer.from_folder(tmp_path, device="cpu", dequantise=True)
    for name, parameter in model.named_parameters():
        assert_same(parameter, expected[name], name)


def test_wider_dtype_is_not_rounded_on_the_way(tmp_path: Path) -> None:
    write(tmp_path, NATIVE, ())
    full = {"dtype": torch.float32, "dequantise": True}
    model = Transformer.from_folder(tmp_path, device="cpu", **full)
    wo = native_tensors(CONFIG, dtype=torch.bfloat16)["layers.0.attention.wo.weight"]
    exact = widened(*quantise(wo))
    assert (model.layers[0].attention.wo - exact).abs().max() <= 1e-7 * exact.abs().max()


def test_activation_scales_are_skipped_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, NATIVE, ())
    with caplog.at_level("INFO", logger="mistral_kernels"):
        checkpoint = Checkpoint(tmp_path, ModelConfig.from_folder(tmp_path))
    skipped, found = (record.getMessage() for record in caplog.records)
    assert "skipped 14 tensors that scale what is not quantised here" in skipped
    assert found == f"{tmp_path}: fp8, FP8"
    assert checkpoint.dtype == torch.bfloat16
    stored = native_tensors(CONFIG, dtype=torch.bfloat16).items()
    scales = 4 * sum(map(is_quantised, dict(stored)))
    weights = sum(t.numel() * (1 if is_quantised(k) else 2) for k, t in stored)
    assert checkpoint.nbytes == weights + scales


@pytest.mark.parametrize("chunk", [1, 300, 1000])
def test_chunks_of_rows(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_low_bit, "CHUNK", chunk)
    expected = parameters_of(write(tmp_path, NATIVE, (4, 2)), CONFIG)
    for full in (True, False):
        model = Transformer.from_folder(tmp_path, device="cpu", dequantise=full)
        for name in ("layers.1.attention.wqkv", "layers.1.feed_forward.w2"):
            weight = model._weights()[name]
            weight = weight if full else weight.dequantise(torch.bfloat16)
            assert_same(weight, expected[name], name)


OWNER = "layers.1.attention.wk."


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("qscale_weight", None, "or qscale_weight or .*: missing"),
        ("qscale_weight", torch.ones(3), r"qscale_weight: expected .* scales for .* shape \(3,\)"),
        ("qscale_weight", torch.ones(1, 1, 1), r"qscale_weight: .* got shape \(1, 1, 1\)"),
        ("qscale_weight", torch.ones(0), r"qscale_weight: .* got shape \(0,\)"),
        ("qscale_weight", torch.ones(4, 3), r"scales for \(16, 32\), got shape \(4, 3\)"),
        ("qscale_weight", torch.ones((), dtype=torch.int32), "expected dtype F32 .* got I32"),
        ("weight", torch.ones(16, 32), "weight: expected dtype F8_E4M3 for fp8, FP8, got F32"),
        ("weight", torch.ones(16, 32).to(torch.float8_e5m2), "expected dtype .* got F8_E5M2"),
        ("weight", torch.ones(8, 32).to(FP8), r"weight: expected shape \(16, 32\), got \(8, 32\)"),
    ],
)
def test_refused(tmp_path: Path, key: str, change: Tensor | None, message: str) -> None:
    write(tmp_path, NATIVE, ())
    path = tmp_path / "consolidated.safetensors"
    tensors = load_file(path)
    tensors.pop(OWNER + key)
    if change is not None:
        tensors[OWNER + key] = change
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"consolidated.safetensors: {OWNER}.*{message}"):
        Checkpoint(tmp_path, CONFIG)
