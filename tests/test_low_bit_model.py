"""A model with low-bit weights: mixed with full ones, moved, copied, and what it refuses."""

import copy
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import low_bit_folders
import pytest
import torch
from low_bit_folders import DENSE, KINDS, MOE
from safetensors.torch import load_file, save_file
from tolerance import assert_same

from mistral_kernels import Transformer
from mistral_kernels.model.low_bit_weight import LowBitWeight
from mistral_kernels.ops.low_bit import FP8, LowBit
from mistral_kernels.tolerance import error, fp32_limit

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])


def load(folder: Path, **changes: object) -> Transformer:
    return Transformer.from_folder(folder, device="cpu", **changes)


def low_bit_names(model: Transformer) -> set[str]:
    modules = model.named_modules()
    return {name for name, part in modules if isinstance(part, LowBitWeight)}


def assert_same_logits(low: Transformer, full: Transformer) -> None:
    logits, exact = (model.forward(IDS, [len(IDS)]) for model in (low, full))
    assert error(logits, exact).within(fp32_limit("reference"))


@pytest.fixture
def awq(tmp_path: Path) -> Transformer:
    low_bit_folders.write(tmp_path, MOE, KINDS["awq"])
    return load(tmp_path / "low")


ATTENTION = {f"layers.{n}.attention.{name}" for n in range(2) for name in ("wqkv", "wo")}
EXPERTS = {f"layers.{n}.feed_forward.{name}" for n in range(2) for name in ("w13", "w2")}
LAYER_0, LAYER_1 = "layers.0.feed_forward.experts.", "layers.1.feed_forward.experts."


@pytest.mark.parametrize(
    ("ignored", "kept", "reason"),
    [
        # Whole layers, as an ignore list names them, say nothing.
        (
            lambda key: key.startswith("layers.0."),
            {n for n in ATTENTION | EXPERTS if "1." in n},
            "",
        ),
        (lambda key: ".attention." in key, EXPERTS, ""),
        (
            lambda key: key == "layers.0.attention.wk.weight",
            (ATTENTION | EXPERTS) - {"layers.0.attention.wqkv"},
            "layers.0.attention.wqkv: of .* one is quantised, one is not",
        ),
        (
            lambda key: key == "layers.1.feed_forward.experts.2.w1.weight",
            (ATTENTION | EXPERTS) - {n for n in EXPERTS if "1." in n},
            "widened 2 weights, such as layers.1.feed_forward.w13: of .* one is",
        ),
        (
            lambda key: ".w2." in key,
            ATTENTION,
            "widened 2 weights, such as layers.0.feed_forward.w13: of .*w2 one is quantised",
        ),
    ],
    ids=["a layer", "attention", "a part", "an expert", "w2"],
)
def test_weights_left_in_full(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ignored: Callable[[str], bool],
    kept: set[str],
    reason: str,
) -> None:
    low_bit_folders.write(tmp_path, MOE, KINDS["packed"], ignored=ignored)
    with caplog.at_level(logging.INFO, logger="mistral_kernels"):
        low = load(tmp_path / "low")
    assert low_bit_names(low) == kept
    assert ("expert_mlp" in low.backends) == (not kept >= EXPERTS)
    assert ("linear_low_bit" in low.backends) == bool(kept & ATTENTION)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 + bool(reason)
    assert "compressed-tensors, 4 bits, groups of 32" in lines[0]
    assert not reason or re.search(reason, lines[1])
    assert_same_logits(low, load(tmp_path / "full"))


WK = "layers.0.attention.wk"


def scales_in_float32(tensors: dict) -> None:
    tensors[f"{WK}.scales"] = tensors[f"{WK}.scales"].float()


def columns_in_order(tensors: dict) -> None:
    tensors[f"{WK}.g_idx"] = tensors[f"{WK}.g_idx"].sort().values


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "awq",
            scales_in_float32,
            r"attention.w[qkv].qweight and .*qweight are not stored alike",
        ),
        (
            "gptq-act-order",
            columns_in_order,
            "attention.w[qkv].qweight and .*qweight have their columns in different",
        ),
    ],
)
def test_joined_weights_that_are_not_stored_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, change: Callable, reason: str
) -> None:
    low_bit_folders.write(tmp_path, DENSE, KINDS[name])
    path = tmp_path / "low" / "consolidated.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with caplog.at_level(logging.INFO, logger="mistral_kernels"):
        low = load(tmp_path / "low")
    assert "layers.0.attention.wqkv" not in low_bit_names(low) and len(low_bit_names(low)) == 7
    assert re.search(f"widened 1 weights, .*{reason}", caplog.text)
    assert_same_logits(low, load(tmp_path / "low", dtype=torch.float64, dequantise=True))


def test_output_and_small_groups_are_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = KINDS["awq"]._replace(size=8, section=low_bit_folders.AWQ | {"group_size": 8})
    low_bit_folders.write(tmp_path / "small", DENSE, small)
    low = load(tmp_path / "small" / "low")
    assert not low_bit_names(low) and low.quantisation is None
    assert_same_logits(low, load(tmp_path / "small" / "full"))
    with monkeypatch.context() as patch:
        patch.setattr(low_bit_folders, "is_quantised", lambda key: key == "output.weight")
        low_bit_folders.write(tmp_path / "output", DENSE, KINDS["awq"])
    low = load(tmp_path / "output" / "low")
    assert not low_bit_names(low)
    assert_same_logits(low, load(tmp_path / "output" / "full"))


def held(model: Transformer) -> dict[str, LowBit]:
    return {name: model.get_submodule(name).tensors for name in low_bit_names(model)}


def assert_same_weights(found: Transformer, expected: Transformer) -> None:
    assert held(found).keys() == held(expected).keys()
    for name, weight in held(expected).items():
        for part, tensor in weight._asdict().items():
            other = getattr(held(found)[name], part)
            assert (other is None) == (tensor is None)
            if tensor is not None:
                assert_same(other, tensor, f"{name}.{part}")


@pytest.mark.parametrize("name", ["awq", "fp8-rows"])
def test_a_change_of_dtype_leaves_codes_and_scales_alone(tmp_path: Path, name: str) -> None:
    low_bit_folders.write(tmp_path, MOE, KINDS[name])
    before, model = load(tmp_path / "low"), load(tmp_path / "low")
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.norm.dtype == torch.bfloat16
    assert_same_weights(model, before)
    assert model.forward(IDS, [len(IDS)]).isfinite().all()
    assert_same_weights(load(tmp_path / "low", dtype=torch.float16), before)
    assert_same_logits(before, load(tmp_path / "low").double())
    for tensors in held(model.to("meta")).values():
        assert tensors.qweight.is_meta and tensors.qweight.dtype in (torch.uint8, FP8)


def test_copies(awq: Transformer) -> None:
    for twin in (copy.deepcopy(awq), pickle.loads(pickle.dumps(awq))):
        assert_same_weights(twin, awq)
        assert twin.quantisation == awq.quantisation == "awq, 4 bits, groups of 32, zero points"
        assert_same(twin.forward(IDS, [len(IDS)]), awq.forward(IDS, [len(IDS)]), "logits")
        twin.get_submodule("layers.0.attention.wo").qweight.zero_()
        assert awq.get_submodule("layers.0.attention.wo").qweight.any(), "no memory is shared"


def test_what_needs_full_weights_says_so(awq: Transformer, tmp_path: Path) -> None:
    calls: dict[str, Callable[[], object]] = {
        "load_lora": lambda: awq.load_lora(tmp_path),
        "unload_lora": lambda: awq.unload_lora(),
        "save_pretrained": lambda: awq.save_pretrained(tmp_path / "new"),
        "state_dict": lambda: awq.state_dict(),
        "load_state_dict": lambda: awq.load_state_dict({}),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: .*few bits; load it with dequantise=True"):
            call()
    assert not (tmp_path / "new").exists()
    wide = load(tmp_path / "low", dequantise=True)
    wide.save_pretrained(tmp_path / "new")
    again = load(tmp_path / "new")
    for name, parameter in wide.named_parameters():
        assert_same(again.get_parameter(name), parameter, name)


def test_how_a_weight_is_shown(awq: Transformer) -> None:
    assert "(64, 64), 4 bits, a scale for each 32 columns" in repr(awq)
