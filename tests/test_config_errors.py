"""Configurations that are refused: the file and the key are named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import huggingface_config, native_params, tiny_config

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
    ("n_layers", 10**9, "n_layers: expected an integer from 1 to 1024"),
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
    ("model_type", "mamba", "model_type: Mamba"),
    ("model_type", "rwkv", "model_type: expected one of transformer"),
    ("quantization", {"qformat_weight": "fp8_e4m3"}, "quantization: .*not supported yet"),
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
    ("quantization_config", {"quant_method": "fp8"}, "quantization_config: .*not supported yet"),
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
