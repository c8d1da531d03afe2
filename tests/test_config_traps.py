"""Values of published `params.json` and `config.json` that are easily read wrong."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import native_params
from transformers import AutoConfig

from mistral_kernels import ModelConfig
from mistral_kernels.model.families import family_of

# Read from copies of the published files.
MINISTRAL_8B = {
    "architectures": ["MistralForCausalLM"],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1e8,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
PIXTRAL_12B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {
        "hidden_size": 5120,
        "head_dim": 128,
        "intermediate_size": 14336,
        "max_position_embeddings": 1024000,
        "model_type": "mistral",
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1e9,
        "sliding_window": None,
        "vocab_size": 131072,
    },
}
MISTRAL_7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
}
TEXT = {
    "model_type": "mistral",
    "hidden_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 8,
    "intermediate_size": 128,
    "vocab_size": 100,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def huggingface(**changes: Any) -> ModelConfig:
    return ModelConfig.from_huggingface(TEXT | changes)


def test_theta_is_absent_from_the_first_mistral_7b() -> None:
    first = ModelConfig.from_native(MISTRAL_7B | {"sliding_window": 4096})
    assert first == ModelConfig.known("mistral-7b-v0.1") and first.rope_theta == 1e4
    assert ModelConfig.from_native(MISTRAL_7B) == ModelConfig.known("mistral-7b-v0.2")


def test_ministral_8b_has_its_windows_in_params_json_alone(tmp_path: Path) -> None:
    known = ModelConfig.known("ministral-8b-instruct-2410")
    (tmp_path / "config.json").write_text(json.dumps(MINISTRAL_8B))
    theirs = ModelConfig.from_folder(tmp_path)
    assert theirs.windows == (32768,) * 36 and family_of(theirs) is None
    windows = {"sliding_window": [None, 32768, 32768, 32768]}
    (tmp_path / "params.json").write_text(json.dumps(native_params(known) | windows))
    # Of a folder with both files the right one is read.
    assert ModelConfig.from_folder(tmp_path) == known
    assert theirs == replace(known, windows=theirs.windows, interleaved=False)


def test_pixtral_12b_leaves_out_what_its_class_has_by_default() -> None:
    config = ModelConfig.from_huggingface(PIXTRAL_12B)
    assert config.q_heads == 32 and family_of(config) == "pixtral-12b-2409"


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "ministral", "ministral3"])
def test_an_empty_text_config_is_its_class(model_type: str) -> None:
    text = {"model_type": model_type}
    ours = ModelConfig.from_huggingface({"model_type": "llava", "text_config": text})
    # As the class writes itself in full.
    full = AutoConfig.for_model(model_type).to_dict()
    assert ours == ModelConfig.from_huggingface(full)
    with pytest.raises(ValueError, match="^hidden_size: missing"):
        ModelConfig.from_huggingface(text)


@pytest.mark.parametrize(
    ("params", "window"),
    [
        ({"sliding_window": None, "_sliding_window": 8}, 8),
        ({"sliding_window": 4, "_sliding_window": 8}, 4),
        ({"sliding_window": "8"}, 8),
        ({"sliding_window": "0"}, None),
        ({"sliding_window": [8]}, 8),
        ({"_sliding_window": [None]}, None),
    ],
)
def test_native_windows(params: dict, window: int | None) -> None:
    config = ModelConfig.from_native(MISTRAL_7B | params)
    assert config.windows == (window,) * 32


def test_a_list_of_windows_repeats_over_the_layers() -> None:
    config = ModelConfig.from_native(MISTRAL_7B | {"_sliding_window": [None, "8", 16, 0]})
    assert config.windows == (None, 8, 16, None) * 8


def test_huggingface_windows() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    # Absent is the class's 4096; null and 0 are none.
    assert huggingface().windows == (4096,) * 4
    assert huggingface(sliding_window=None).windows == (None,) * 4
    assert huggingface(sliding_window=0).windows == (None,) * 4
    assert huggingface(sliding_window="8").windows == (8,) * 4
    for model_type in ("mistral", "ministral", "ministral3"):
        windows = huggingface(model_type=model_type, sliding_window=8, layer_types=kinds).windows
        assert windows == (None, 8) * 2
    assert huggingface(layer_types=kinds).windows == (None, 4096) * 2
    assert huggingface(sliding_window=8, layer_types=None).windows == (8,) * 4
    assert huggingface(sliding_window=8, layer_types=kinds[:1] * 4).windows == (None,) * 4


def test_theta_stands_in_three_places() -> None:
    assert huggingface(rope_theta=5e5).rope_theta == 5e5
    assert huggingface(rope_parameters={"rope_theta": 7e5}).rope_theta == 7e5
    assert huggingface(rope_theta=5e5, rope_scaling=None).rope_theta == 5e5
    assert huggingface(rope_theta=5e5, rope_scaling=YARN).rope_theta == 5e5
    assert huggingface(rope_theta=5e5, rope_parameters={"rope_theta": 7e5}).rope_theta == 7e5
    both = {"rope_scaling": YARN | {"rope_theta": 8e5}, "rope_parameters": {"rope_theta": 7e5}}
    assert huggingface(**both).rope_theta == 8e5
    assert AutoConfig.for_model(**TEXT, **both).rope_parameters["rope_theta"] == 8e5


def test_head_dim_is_not_hidden_by_heads() -> None:
    for config in (huggingface(), ModelConfig.known("mistral-nemo-base-2407")):
        assert config.q_heads * config.head_dim != config.hidden
    # Only where the file does not say it; Ministral 3 has its own default.
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    assert ModelConfig.from_huggingface(text).head_dim == 10
    assert ModelConfig.from_huggingface(text | {"model_type": "ministral3"}).head_dim == 128


@pytest.mark.parametrize("top", [None, False, True])
@pytest.mark.parametrize("below", [None, False, True])
def test_ties_of_a_multimodal_model(top: bool | None, below: bool | None) -> None:
    def tied(wrapper: str) -> bool:
        config = {"model_type": wrapper, "tie_word_embeddings": top}
        config["text_config"] = TEXT | {"tie_word_embeddings": below}
        return ModelConfig.from_huggingface(config).tied_embeddings

    # transformers 5 writes true and false of a Mistral Small 3.1, which has an output of its own.
    assert tied("mistral3") == (bool({top, below} - {None}) and False not in (top, below))
    assert tied("llava") == (True in (top, below))


def test_who_scales_cos_and_sin() -> None:
    native = {"factor": 16, "original_max_position_embeddings": 64, "beta": 32.0, "alpha": 1.0}
    scaled = 0.1 * math.log(16) + 1
    for flag, factor in ((False, 1.0), (True, scaled), (None, scaled)):
        params = MISTRAL_7B | {"yarn": native | {"apply_scale": flag}}
        assert ModelConfig.from_native(params).yarn.attention_factor == factor
    yarn = YARN | {"factor": 16.0}
    for mscale, all_dim, factor in ((1.0, 1.0, 1.0), (1.0, 0.0, scaled), (None, None, scaled)):
        said = yarn | {"mscale": mscale, "mscale_all_dim": all_dim}
        assert huggingface(rope_parameters=said).yarn.attention_factor == factor


def test_query_scale() -> None:
    scaling = {"original_max_position_embeddings": 64, "beta": 0.0}
    assert ModelConfig.from_native(MISTRAL_7B | {"llama_4_scaling": scaling}).q_scale is None
    scaling["beta"] = 0.1
    native = ModelConfig.from_native(MISTRAL_7B | {"llama_4_scaling": scaling}).q_scale
    assert huggingface(rope_parameters=YARN | {"llama_4_scaling_beta": 0.1}).q_scale == native
    assert huggingface(rope_parameters=YARN | {"llama_4_scaling_beta": 0.0}).q_scale is None


def test_both_readers_fill_max_positions() -> None:
    assert ModelConfig.from_native(MISTRAL_7B).max_positions is None
    for key in ("max_seq_len", "max_position_embeddings"):
        config = ModelConfig.from_native(MISTRAL_7B | {key: 1000})
        assert config.max_positions == 1000
        assert config == ModelConfig.from_native(MISTRAL_7B)  # it is not compared
    assert huggingface(max_position_embeddings=1000).max_positions == 1000
    for model_type in ("mistral", "mixtral", "ministral", "ministral3"):
        theirs = AutoConfig.for_model(model_type).max_position_embeddings
        assert huggingface(model_type=model_type).max_positions == theirs
