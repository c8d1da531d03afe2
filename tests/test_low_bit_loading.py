"""Folders of every low-bit format: what the model becomes of them, in both layouts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import low_bit_folders
import pytest
import torch
from command_line import run_cli
from low_bit_folders import DENSE, KINDS, MOE, Kind, is_quantised
from tolerance import assert_same
from torch import Tensor

from mistral_kernels import ModelConfig, Transformer
from mistral_kernels.checkpoint_info import collect_checkpoint
from mistral_kernels.model.checkpoint_files import read_headers
from mistral_kernels.model.low_bit_weight import LowBitWeight
from mistral_kernels.ops.low_bit import LowBit
from mistral_kernels.tolerance import error, fp32_limit

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
SEQLENS = [7, 4]
LAYOUTS = ["native", "huggingface"]


def load(folder: Path, **changes: object) -> Transformer:
    return Transformer.from_folder(folder, device="cpu", **changes)


def config_of(shape: ModelConfig, layout: str) -> ModelConfig:
    return replace(shape, interleaved=layout == "native")


def low_bits(model: Transformer) -> dict[str, LowBit]:
    modules = model.named_modules()
    return {name: part.tensors for name, part in modules if isinstance(part, LowBitWeight)}


def full_weights(model: Transformer) -> dict[str, Tensor]:
    """Every weight in float64."""
    return {
        name: weight.dequantise(torch.float64) if isinstance(weight, LowBit) else weight
        for name, weight in model._weights().items()
    }


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(found[name], tensor, name)


def combinations() -> list:
    """Every format in the layouts that it has, and dense or mixture by turns."""
    found = []
    for number, (name, kind) in enumerate(KINDS.items()):
        for turn, layout in enumerate(LAYOUTS[: 1 if kind.native else 2]):
            shape = ("dense", "moe")[(number + turn) % 2]
            found.append(pytest.param(kind, layout, shape, id=f"{name}-{layout}-{shape}"))
    return found


@pytest.mark.parametrize(("kind", "layout", "shape"), combinations())
def test_every_format(tmp_path: Path, kind: Kind, layout: str, shape: str) -> None:
    config = config_of({"dense": DENSE, "moe": MOE}[shape], layout)
    low_bit_folders.write(tmp_path, config, kind)
    full, low = load(tmp_path / "full"), load(tmp_path / "low")
    expected = full_weights(full)
    wide = load(tmp_path / "low", dtype=torch.float64, dequantise=True)
    assert_equal(dict(wide.named_parameters()), expected)
    assert wide.quantisation is None and not low_bits(wide)

    assert_equal({k: w.double() for k, w in full_weights(low).items()}, expected)
    kept = low_bits(low)
    assert len(kept) == 4 * config.layers, "every projection stays in few bits"
    assert {weight.bits for weight in kept.values()} == {kind.bits}
    assert all((weight.perm is not None) == kind.act_order for weight in kept.values())
    assert low.dtype == torch.float32
    ops = {"linear_low_bit"} | ({"expert_mlp_low_bit"} if config.experts else set())
    assert ops <= low.backends.keys() and "expert_mlp" not in low.backends

    logits, exact = (model.forward(IDS, SEQLENS) for model in (low, full))
    assert error(logits, exact).within(fp32_limit("reference"))


@pytest.mark.parametrize("name", ["awq", "gptq-act-order", "fp8-native"])
def test_tensors_of_a_weight_in_several_files(tmp_path: Path, name: str) -> None:
    low_bit_folders.write(tmp_path, DENSE, KINDS[name], shards=5)
    expected = full_weights(load(tmp_path / "full"))
    assert_equal({k: w.double() for k, w in full_weights(load(tmp_path / "low")).items()}, expected)


@pytest.mark.parametrize("name", ["awq", "gptq", "packed", "packed-8-bits-rows", "fp8-rows"])
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_resident_bytes(tmp_path: Path, shape: ModelConfig, name: str) -> None:
    kind = KINDS[name]
    low_bit_folders.write(tmp_path, shape, kind)
    model = load(tmp_path / "low")
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    expected = 0
    for key, full in read_headers([tmp_path / "full" / "consolidated.safetensors"]).items():
        rows, columns = (*full.shape, 1)[:2]
        if is_quantised(key):
            groups = rows * columns // (kind.size or columns)
            expected += rows * columns * kind.bits / 8 + groups * kind.scales.itemsize
            expected += groups * (0 if kind.symmetric else 1)
        else:
            expected += rows * columns * 4
    assert abs(resident / expected - 1) < 0.03

    facts = collect_checkpoint(tmp_path / "low")
    assert facts["problem"] is None and facts["quantisation"] == model.quantisation
    assert facts["bytes"] == facts["memory"]["cpu"]["weights"] == resident
    assert facts["ops"]["cpu"] == model.backends
    assert model.quantisation in run_cli("info", tmp_path / "low").out
