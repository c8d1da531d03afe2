"""What a configuration may say of quantised weights; anything else is refused, the key named."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from checkpoints import native_params
from low_bit_folders import AWQ, DENSE, GPTQ, HF_FP8, KINDS, compressed

from mistral_kernels import ModelConfig
from mistral_kernels.model.json_fields import JsonFields
from mistral_kernels.model.quantisation import read_quantisation

GROUPS = {"strategy": "group", "group_size": 32}


def changed(section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The section with other values; None takes one out, "weights" changes those of the group."""
    section = deepcopy(section)
    section.get("config_groups", {}).get("group_0", {}).get("weights", {}).update(
        changes.pop("weights", {})
    )
    return {key: value for key, value in (section | changes).items() if value is not None}


PACKED = compressed("pack-quantized", **GROUPS)
INT8 = compressed("int-quantized", strategy="channel", num_bits=8)
FP8 = compressed("float-quantized", strategy="channel", num_bits=8, type="float")
CONFIGS = [
    (changed(AWQ, bits=None), "bits: missing"),
    (changed(AWQ, bits="4"), "bits: expected 4, got '4'"),
    (changed(AWQ, bits=8), "bits: expected 4, got 8"),
    (changed(AWQ, group_size=None), "group_size: missing"),
    (changed(AWQ, group_size=0), "group_size: expected an integer from 1"),
    (changed(AWQ, group_size=32.0), "group_size: expected an integer from 1"),
    (changed(AWQ, version="gemv"), "version: expected one of gemm, GEMM, got 'gemv'"),
    (changed(AWQ, version=None), "version: missing"),
    (changed(AWQ, zero_point=1), "zero_point: expected true or false"),
    (changed(AWQ, desc_act=True), "desc_act: awq has no act-order, got True"),
    (changed(GPTQ, bits=3), "bits: expected 4 or 8, got 3"),
    (changed(GPTQ, bits=True), "bits: expected 4 or 8, got True"),
    (changed(GPTQ, group_size="128"), "group_size: expected an integer"),
    (changed(GPTQ, checkpoint_format="marlin"), "checkpoint_format: expected one of gptq, gptq_v2"),
    (changed(GPTQ, pack_dtype="int64"), "pack_dtype: expected one of int32, got 'int64'"),
    (changed(GPTQ, desc_act="yes"), "desc_act: expected true or false"),
    (changed(GPTQ, rotation="hadamard"), "rotation: models that rotate .* got 'hadamard'"),
    (changed(AWQ, rotation="random"), "rotation: models that rotate .* got 'random'"),
    (changed(HF_FP8, weight_block_size=[128]), "weight_block_size: expected two integers"),
    (changed(HF_FP8, activation_scheme="odd"), "activation_scheme: expected one of static"),
    (changed(PACKED, config_groups=None), "config_groups: missing"),
    (changed(PACKED, config_groups={"W4A16": ["Linear"]}), "config_groups.W4A16: expected an obj"),
    (changed(PACKED, config_groups={"group_0": {"targets": []}}), "group_0.weights: missing"),
    (changed(PACKED, format=None), "format: missing"),
    (changed(PACKED, format="marlin-24"), "format: expected one of pack-quantized"),
    (changed(PACKED, format="nvfp4-pack-quantized"), "format: expected one of pack-quantized"),
    (changed(PACKED, quantization_status="calibration"), "status: expected one of compressed"),
    (changed(PACKED, sparsity_config={"format": "sparse-24-bitmask"}), "format: expected dense"),
    (changed(PACKED, transform_config={"a": 1}), "transform_config: transformed weights"),
    (changed(PACKED, weights={"num_bits": 3}), "weights.num_bits: expected 4 or 8, got 3"),
    (changed(PACKED, weights={"type": "float"}), "weights.type: expected int for pack-quantized"),
    (changed(PACKED, weights={"dynamic": True}), "weights.dynamic: expected false"),
    (changed(PACKED, weights={"group_size": None}), "weights.group_size: missing"),
    (changed(PACKED, weights={"strategy": "token"}), "weights.strategy: expected one of tensor"),
    (changed(PACKED, weights={"actorder": "odd"}), "weights.actorder: expected weight, group or"),
    (changed(INT8, weights={"actorder": "group"}), "weights.actorder: expected null or weight"),
    (changed(INT8, weights={"type": "float"}), "weights.type: expected int for int-quantized"),
    (
        changed(INT8, weights={"group_size": 64}),
        "group_size: expected null for strategy ch",
    ),
    (changed(INT8, weights={"block_structure": [1, 8]}), "strategy channel has no blocks"),
    (
        changed(FP8, weights={"type": None}),
        "type: expected float for float-quant.*got None",
    ),
    (changed(FP8, weights={"symmetric": False}), "weights.symmetric: expected true"),
    (changed(FP8, weights={"num_bits": 4}), "weights.num_bits: expected 8, got 4"),
    (changed(FP8, weights={"strategy": "block"}), "weights.block_structure: missing"),
]


def test_configurations(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    params = native_params(DENSE)
    for section, message in CONFIGS:
        path.write_text(json.dumps(params | {"quantization_config": section}))
        pattern = rf"^{re.escape(str(path))}: quantization_config\..*{message}"
        with pytest.raises(ValueError, match=pattern):
            ModelConfig.from_folder(tmp_path)


def test_two_descriptions(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    params = native_params(DENSE)
    both = {"quantization": AWQ, "quantization_config": AWQ}
    path.write_text(json.dumps(params | both))
    with pytest.raises(ValueError, match="params.json: quantization: there is a quantization_conf"):
        ModelConfig.from_folder(tmp_path)
    groups = PACKED["config_groups"] | {"b": INT8["config_groups"]["group_0"]}
    mixed = PACKED | {"format": "naive-quantized", "config_groups": groups}
    path.write_text(json.dumps(params | {"quantization": mixed}))
    with pytest.raises(ValueError, match="quantization.config_groups: expected weights of one"):
        ModelConfig.from_folder(tmp_path)


def test_what_was_found_in_words():
    said = {
        name: str(read_quantisation(JsonFields({"quantization": kind.section})))
        for name, kind in KINDS.items()
    }
    assert said["awq"] == "awq, 4 bits, groups of 32, zero points"
    assert said["awq-symmetric"] == "awq, 4 bits, groups of 32"
    assert said["gptq-act-order"] == "gptq, 4 bits, groups of 32, zero points, act-order"
    assert said["gptq-symmetric-rows"] == "gptq, 4 bits, a scale for each row"
    assert said["int8-rows"] == "compressed-tensors, 8 bits, a scale for each row"
    assert said["fp8-blocks"] == "compressed-tensors, FP8, groups of 32"
    assert said["fp8-native"] == "fp8, FP8"


def test_quantised_activations_are_noted():
    for section in (GPTQ, GPTQ | {"activation": {"mlp": {"layers": [0]}}}):
        found = read_quantisation(JsonFields({"quantization": section}))
        assert found.note == ("activations" if "activation" in section else "")


def test_nothing_said():
    for values in ({}, {"quantization_config": None}, {"quantization": {}}):
        assert read_quantisation(JsonFields(values)) is None
