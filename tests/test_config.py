"""ModelConfig: what both layouts' files mean, and which of the two a folder is read in."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import huggingface_config, native_params, tiny_config
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mistral_kernels.model.config import ModelConfig, QueryScale, Yarn
from mistral_kernels.model.layouts import folder_layout

GOLDEN = Path(__file__).parent / "golden"
NATIVE = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
}
NEMO = NATIVE | {"dim": 5120, "n_layers": 40, "vocab_size": 131072, "rope_theta": 1e6}
MINISTRAL_8B = NATIVE | {
    "n_layers": 36,
    "hidden_dim": 12288,
    "vocab_size": 131072,
    "rope_theta": 1e8,
    "sliding_window": [None, 32768, "32768", 32768],
}
MINISTRAL3_3B = NATIVE | {
    "dim": 3072,
    "n_layers": 26,
    "hidden_dim": 9216,
    "vocab_size": 131072,
    "rope_theta": 1e6,
    "tied_embeddings": True,
    "q_lora_rank": None,
    "kv_lora_rank": None,
    "vision_encoder": {"hidden_size": 1024},
    "yarn": {
        "factor": 16,
        "original_max_position_embeddings": 16384,
        "alpha": 1.0,
        "beta": 32.0,
        "apply_scale": False,
    },
    "llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1},
}
MIXTRAL = NATIVE | {"moe": {"num_experts": 8, "num_experts_per_tok": 2}}
HUGGINGFACE = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "vocab_size": 100,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "windows", "theta"),
    [
        ({}, None, 1e6),
        ({"sliding_window": None}, None, 1e6),
        ({"sliding_window": 0}, None, 1e6),
        ({"sliding_window": 4096}, 4096, 1e4),
        ({"sliding_window": "4096"}, 4096, 1e4),
        ({"_sliding_window": 4096}, 4096, 1e4),
        ({"sliding_window": 4096, "rope_theta": 1e6}, 4096, 1e6),
    ],
)
def test_native_window_and_theta(changes: dict, windows: int | None, theta: float) -> None:
    config = ModelConfig.from_native(NATIVE | changes)
    assert (config.windows, config.rope_theta) == ((windows,) * 32, theta)


def test_native_families() -> None:
    ministral = ModelConfig.from_native(MINISTRAL_8B)
    assert ministral.windows == (None, 32768, 32768, 32768) * 9
    nemo = ModelConfig.from_native(NEMO)
    assert (nemo.head_dim, nemo.q_heads * nemo.head_dim, nemo.hidden) == (128, 4096, 5120)
    ministral3 = ModelConfig.from_native(MINISTRAL3_3B)
    assert ministral3.yarn == Yarn(16.0, 16384, 32.0, 1.0, attention_factor=1.0)
    assert ministral3.q_scale == QueryScale(0.1, 16384)
    assert ministral3.tied_embeddings
    mixtral = ModelConfig.from_native(MIXTRAL)
    assert (mixtral.experts, mixtral.top_k) == (8, 2)
    no_head_dim = {key: value for key, value in NATIVE.items() if key != "head_dim"}
    assert ModelConfig.from_native(no_head_dim) == ModelConfig.from_native(NATIVE)
    scaled = MINISTRAL3_3B["yarn"] | {"apply_scale": True}
    yarn = ModelConfig.from_native(MINISTRAL3_3B | {"yarn": scaled}).yarn
    assert yarn is not None and yarn.attention_factor == 0.1 * math.log(16) + 1


@pytest.mark.parametrize("changes", [{}, {"rope_theta": 5e5}, {"head_dim": 32}])
@pytest.mark.parametrize("keys", ["absent", "null"])
@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "ministral", "ministral3"])
def test_absent_keys_mean_what_transformers_means(
    model_type: str, keys: str, changes: dict
) -> None:
    values = HUGGINGFACE | {"model_type": model_type} | changes
    if keys == "null":
        values |= {"sliding_window": None, "head_dim": None} | changes
        if model_type == "ministral3" and values["head_dim"] is None:
            del values["head_dim"]  # the one class that takes no null here
    ours = ModelConfig.from_huggingface(values)
    theirs = AutoConfig.for_model(**values)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.windows == (theirs.sliding_window,) * 4
    assert ours.head_dim == (theirs.head_dim or 64 // theirs.num_attention_heads)
    if model_type == "mixtral":
        assert (ours.experts, ours.top_k) == (theirs.num_local_experts, theirs.num_experts_per_tok)
    rope = theirs.rope_parameters
    assert (ours.q_scale.beta if ours.q_scale else None) == rope.get("llama_4_scaling_beta")


def test_null_kv_heads_mean_no_grouping() -> None:
    # As transformers 4 has it; 5 refuses the null.
    config = ModelConfig.from_huggingface(HUGGINGFACE | {"num_key_value_heads": None})
    assert config.kv_heads == config.q_heads == 8


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_factor": 1.5},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 2.0, "mscale_all_dim": 0.5},
        {"mscale": 1.0, "mscale_all_dim": 0.0},
        {"factor": None},
        {"beta_fast": 4.0, "beta_slow": 2.0, "factor": 0.5},
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_attention_factor(key: str, changes: dict) -> None:
    values = HUGGINGFACE | {"rope_theta": 1e6, "max_position_embeddings": 512, key: YARN | changes}
    yarn = ModelConfig.from_huggingface(values).yarn
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**values), torch.device("cpu"))
    assert yarn == Yarn(
        changes.get("factor", 4.0) or 8.0,  # null: the ratio of the lengths, 512 / 64
        64,
        changes.get("beta_fast", 32.0),
        changes.get("beta_slow", 1.0),
        factor,
    )


def test_text_part_of_a_multimodal_config() -> None:
    text = HUGGINGFACE | {"rope_theta": 1e9, "sliding_window": None, "num_key_value_heads": 2}
    plain = ModelConfig.from_huggingface(text)
    wrapper = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    assert ModelConfig.from_huggingface(wrapper | {"text_config": text}) == plain
    tied = wrapper | {"text_config": text, "tie_word_embeddings": True}
    assert ModelConfig.from_huggingface(tied) == replace(plain, tied_embeddings=True)


@pytest.mark.parametrize("case", [path.name for path in sorted(GOLDEN.iterdir()) if path.is_dir()])
def test_layouts_of_a_model_agree(case: str) -> None:
    native = ModelConfig.from_folder(GOLDEN / case / "mistral")
    huggingface = ModelConfig.from_folder(GOLDEN / case / "hf")
    assert native.interleaved and huggingface == replace(native, interleaved=False)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(windows=(None, 4)),
        tiny_config(experts=4, top_k=2, tied_embeddings=True),
        tiny_config(yarn=Yarn(4.0, 16, 2.0, 0.5, 1.0), q_scale=QueryScale(0.1, 16)),
    ],
    ids=["windows", "moe", "yarn"],
)
def test_written_config_is_read_back(config: ModelConfig) -> None:
    assert ModelConfig.from_native(native_params(config)) == config
    huggingface = ModelConfig.from_huggingface(huggingface_config(config))
    assert huggingface == replace(config, interleaved=False)


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        (["params.json"], "native"),
        (["config.json"], "huggingface"),
        (["params.json", "config.json"], "native"),
        (["params.json", "config.json", "model.safetensors.index.json"], "huggingface"),
        (
            ["params.json", "config.json", "model.safetensors", "consolidated.safetensors"],
            "native",
        ),
        (["params.json", "config.json", "consolidated.00.pth", "model.safetensors"], "huggingface"),
        (["params.json", "config.json", "consolidated.00.pth", "pytorch_model.bin"], "native"),
    ],
)
def test_folder_layout(tmp_path: Path, files: list[str], layout: str) -> None:
    for name in files:
        (tmp_path / name).write_text(json.dumps({}))
    assert folder_layout(tmp_path) == layout
