"""Configurations that are refused: the file and the key are named."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    huggingface_config,
    native_params,
    tiny_config,
    write_huggingface,
    write_native,
)

from mistral_kernels import Transformer
from mistral_kernels.model.config import ModelConfig, QueryScale, Yarn

NUMBERS = [float("nan"), float("inf"), -1, True, "1", [1], 0]
NATIVE = [
    *(("dim", value, "dim: expected an integer") for value in (*NUMBERS, 2.0, 2**31)),
    *(("norm_eps", value, "norm_eps: expected a finite number > 0") for value in NUMBERS),
    *(("rope_theta", value, "rope_theta: expected a finite") for value in (*NUMBERS, 10**400)),
    *(("sliding_window", value, "sliding_window: expected") for value in (-1, 1.5, True, "a", [])),
    ("sliding_window", [4, 4, 4], "sliding_window: expected a list whose length divides"),
    ("sliding_window", [4, -2], "sliding_window: expected a window >= 1"),
    *((key, None, f"{key}: missing") for key in ("dim", "n_layers", "n_heads", "n_kv_heads")),
    *((key, None, f"{key}: missing") for key in ("hidden_dim", "vocab_size", "norm_eps")),
    ("n_layers", 10**9, "n_layers: expected an integer from 1 to 256"),
    ("n_kv_heads", 3, "q_heads 4 is not a multiple of kv_heads 3"),
    ("head_dim", 7, "head_dim: expected an even number, got 7"),
    ("tied_embeddings", 1, "tied_embeddings: expected true or false"),
    ("moe", {"num_experts": 4}, "moe.num_experts_per_tok: missing"),
    ("moe", {"num_experts": 2, "num_experts_per_tok": 3}, "top_k 3 and experts 2"),
    ("moe", {"num_experts": 2, "num_shared_experts": 1}, "moe.num_shared_experts: MLA"),
    ("moe", {"num_experts": 2, "route_every_n": 2}, "moe.route_every_n: not supported"),
    ("moe", 3, "moe: expected an object, got 3"),
    ("yarn", {"factor": 4}, "yarn.original_max_position_embeddings: missing"),
    ("yarn", {"factor": "4"}, "yarn.factor: expected a finite number"),
    ("llama_4_scaling", {"beta": -1}, "llama_4_scaling.beta: expected a finite number >= 0"),
    ("kv_lora_rank", 512, "kv_lora_rank: MLA"),
    ("q_lora_rank", 512, "q_lora_rank: MLA"),
    ("activation", "gelu", "activation: expected one of silu, got 'gelu'"),
    ("model_type", "mamba", "model_type: Mamba"),
    ("model_type", "rwkv", "model_type: expected one of transformer"),
    ("quantization", {"qformat_weight": "nvfp4"}, "quantization.qformat_weight: .* got 'nvfp4'"),
    ("quantization", {"quant_method": "nvfp4"}, "quantization.quant_method: .* got 'nvfp4'"),
    ("quantization", {"qscheme_act": "TENSOR"}, "quantization.quant_method: missing"),
    (
        "quantization",
        {"qformat_weight": "fp8_e4m3", "qscheme_act": "TOKEN"},
        "quantization.qscheme_act: expected one of TENSOR, NO_SCALES, got 'TOKEN'",
    ),
    (
        "quantization_config",
        {"quant_method": "bitsandbytes"},
        "quantization_config.quant_method: .* got 'bitsandbytes'",
    ),
]
HUGGINGFACE = [
    ("hidden_size", None, "hidden_size: missing"),
    ("num_hidden_layers", None, "num_hidden_layers: missing"),
    ("num_attention_heads", None, "num_attention_heads: missing"),
    ("intermediate_size", None, "intermediate_size: missing"),
    ("vocab_size", None, "vocab_size: missing"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps: expected a finite number > 0, got nan"),
    ("sliding_window", -4, "sliding_window: expected a window >= 1"),
    ("layer_types", ["full_attention"], "layer_types: expected 2 times"),
    ("layer_types", ["chunked", {}], "layer_types: expected 2 times"),
    ("sliding_window", None, "layer_types: expected no sliding_attention without"),
    ("hidden_act", "gelu", "hidden_act: expected one of silu, got 'gelu'"),
    ("model_type", None, "model_type: missing"),
    ("model_type", "llama", "model_type: expected one of mistral, mixtral"),
    ("model_type", "mamba2", "model_type: Mamba"),
    ("model_type", "mistral4", "model_type: MLA"),
    ("model_type", "mistral3", "text_config: missing"),
    ("architectures", ["MistralForSequenceClassification"], "architectures: expected"),
    ("kv_lora_rank", 512, "kv_lora_rank: MLA"),
    ("n_shared_experts", 1, "n_shared_experts: MLA"),
    *(
        ("quantization_config", {"quant_method": method}, f"quant_method: .* got '{method}'")
        for method in ("bitsandbytes", "modelopt", "nvfp4", "torchao")
    ),
    ("quantization_config", {"bits": 4}, "quantization_config.quant_method: missing"),
    ("attention_bias", True, "attention_bias: biases are not supported"),
    ("rope_parameters", {"rope_type": "llama3"}, "rope_parameters.rope_type: expected one of"),
    ("rope_parameters", {"full_attention": {}}, "rope_parameters.full_attention: expected one"),
    ("rope_parameters", {"rope_theta": float("inf")}, "rope_parameters.rope_theta: expected a"),
    ("rope_scaling", {"type": "linear"}, "rope_scaling.type: expected one of"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor: expected 1.0, got 0.5"),
    ("head_dim", "8", "head_dim: expected an integer"),
]


def refused(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder / name))}: .*{message}"):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize(("key", "value", "message"), NATIVE)
def test_params_json(tmp_path: Path, key: str, value: Any, message: str) -> None:
    params = native_params(tiny_config()) | {key: value}
    refused(tmp_path, "params.json", json.dumps(params), message)


@pytest.mark.parametrize(("key", "value", "message"), HUGGINGFACE)
def test_config_json(tmp_path: Path, key: str, value: Any, message: str) -> None:
    config = huggingface_config(tiny_config()) | {key: value}
    refused(tmp_path, "config.json", json.dumps(config), message)


@pytest.mark.parametrize("name", ["params.json", "config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "\udc80"])
def test_malformed_json(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    message = "expected a JSON object" if text == "[1]" else "not valid JSON"
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        ModelConfig.from_folder(tmp_path)


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no params.json nor config.json"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no-folder: no such folder"):
        ModelConfig.from_folder(tmp_path / "no-folder")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        ModelConfig.from_folder(tmp_path, layout="huggingface")
    with pytest.raises(NotADirectoryError, match="expected a checkpoint folder, got a file"):
        ModelConfig.from_folder(tmp_path / "params.json")
    with pytest.raises(ValueError, match="layout: expected None, 'native' or 'huggingface'"):
        ModelConfig.from_folder(tmp_path, layout="hf")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (4,)}, "windows: expected 2 entries, got 1"),
        ({"windows": (4, 0)}, "windows: expected None or >= 1, got 0"),
        ({"experts": 4}, "top_k 0 and experts 4"),
        ({"top_k": 1}, "top_k 1 and experts 0"),
        ({"experts": -1}, "experts -1"),
        ({"hidden": 0}, "hidden: expected >= 1, got 0"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a finite number > 0, got nan"),
    ],
)
def test_fields(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ModelConfig: .*{message}"):
        tiny_config(**changes)


def test_fields_of_rope_scaling() -> None:
    with pytest.raises(ValueError, match="Yarn: factor: expected a finite number > 0, got 0"):
        Yarn(0, 16, 32.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="QueryScale: original_max_positions: expected >= 1"):
        QueryScale(0.1, 0)


SIZES = {
    "params.json": ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads"]
    + ["vocab_size", "norm_eps", "rope_theta", "max_seq_len"],
    "config.json": ["hidden_size", "num_hidden_layers", "head_dim", "intermediate_size"]
    + ["num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps"]
    + ["max_position_embeddings", "num_local_experts", "num_experts_per_tok"],
}
ABSURD = [0, -1, 10**400, math.nan, math.inf, -math.inf, True, "8", [8], {}]
NUMBERS_OF_ANY_SIZE = {"norm_eps", "rms_norm_eps", "rope_theta"}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in SIZES.items() for key in keys]
)
def test_absurd_values_name_their_key(tmp_path: Path, name: str, key: str) -> None:
    config = tiny_config(experts=4, top_k=2)
    values = native_params(config) if name == "params.json" else huggingface_config(config)
    for value in ABSURD if key in NUMBERS_OF_ANY_SIZE else [*ABSURD, 2**40]:
        (tmp_path / name).write_text(json.dumps(values | {key: value}))
        # There are no weights: a value that passes is answered with another error.
        with pytest.raises(ValueError, match=rf"{name}: {key}: expected"):
            Transformer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": 2**31 - 1, "ffn_dim": 2**31 - 1},
        {"vocab": 2**31 - 1},
        {"q_heads": 2**30, "head_dim": 2**30},
        {"layers": 256, "experts": 64, "top_k": 64, "ffn_dim": 2**31 - 1},
    ],
    ids=["wide", "vocab", "heads", "deep"],
)
@pytest.mark.parametrize("write", [write_native, write_huggingface])
def test_sizes_that_no_machine_holds(tmp_path: Path, write: Callable, changes: dict) -> None:
    # The weights of a small model: what they contradict must not be allocated first.
    write(tmp_path, tiny_config())
    name, describe = ("params.json", native_params)
    if write is write_huggingface:
        name, describe = ("config.json", huggingface_config)
    (tmp_path / name).write_text(json.dumps(describe(tiny_config(**changes))))
    with pytest.raises(ValueError, match="expected shape|not a tensor of this model"):
        Transformer.from_folder(tmp_path)
