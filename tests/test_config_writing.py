"""params.json and config.json as the package writes them: what the model is, or nothing."""

import re
from dataclasses import replace

import checkpoints
import pytest
import torch

from mistral_kernels.model.config import ModelConfig, QueryScale, Yarn
from mistral_kernels.model.config_writing import huggingface_config, native_params
from mistral_kernels.model.families import NAMES

tiny = checkpoints.tiny_config
YARN = Yarn(16.0, 16384, 32.0, 1.0, attention_factor=1.0)
SCALED = replace(YARN, factor=4.0, attention_factor=1.1386294361119891)  # 1 + ln(4) / 10
CONFIGS = {
    "window": tiny(),
    "full": tiny(windows=(None, None), max_positions=32768),
    "moe": tiny(windows=(None, None), experts=8, top_k=2, max_positions=65536),
    "moe-window": tiny(experts=3, top_k=1),
    "moe-yarn": tiny(experts=3, top_k=1, yarn=YARN),
    "interleaved-windows": tiny(layers=8, windows=(None, 9, 9, 9) * 2, rope_theta=1e8),
    "irregular-windows": tiny(layers=3, windows=(9, None, None), yarn=YARN),
    "yarn": tiny(windows=(None, None), yarn=YARN, tied_embeddings=True, max_positions=262144),
    "yarn-scaled": tiny(yarn=SCALED, max_positions=999),
    "ministral3": tiny(yarn=YARN, q_scale=QueryScale(0.1, 16384)),
    "q_scale-alone": tiny(q_scale=QueryScale(0.5, 8)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("interleaved", [True, False], ids=["from-native", "from-huggingface"])
def test_what_is_written_is_read_back(config: ModelConfig, interleaved: bool) -> None:
    config = replace(config, interleaved=interleaved)
    native = ModelConfig.from_native(native_params(config))
    assert native == replace(config, interleaved=True)
    assert native.max_positions == config.max_positions
    huggingface = ModelConfig.from_huggingface(huggingface_config(config))
    assert huggingface == replace(config, interleaved=False)
    assert huggingface.max_positions == config.max_positions or config.max_positions is None


@pytest.mark.parametrize("name", NAMES)
def test_every_published_model_can_be_written_in_both_layouts(name: str) -> None:
    config = ModelConfig.known(name)
    native = ModelConfig.from_native(native_params(config))
    huggingface = ModelConfig.from_huggingface(huggingface_config(config))
    for read, interleaved in ((native, True), (huggingface, False)):
        assert read == replace(config, interleaved=interleaved)
        assert read.max_positions == config.max_positions


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_tests_own_writer_agrees(config: ModelConfig) -> None:
    assert ModelConfig.from_native(checkpoints.native_params(config)) == config


def test_params_of_a_plain_model_are_those_of_the_first_release() -> None:
    params = native_params(tiny(windows=(None, None)))
    assert params == {
        "dim": 24,
        "n_layers": 2,
        "head_dim": 8,
        "hidden_dim": 40,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 32,
        "rope_theta": 1e4,
    }


@pytest.mark.parametrize(
    ("windows", "written"),
    [
        ((4, 4, 4, 4), 4),
        ((None, 4, None, 4), [None, 4]),
        ((None, 4, 4, 4), [None, 4, 4, 4]),
        ((4, 5, 4, 5), [4, 5]),
    ],
)
def test_windows_are_a_number_or_the_shortest_pattern(windows: tuple, written: object) -> None:
    assert native_params(tiny(layers=4, windows=windows))["sliding_window"] == written


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("window", "mistral"),
        ("full", "mistral"),
        ("moe", "mixtral"),
        ("moe-yarn", "mixtral"),
        ("interleaved-windows", "ministral"),
        ("irregular-windows", "ministral"),
        ("yarn", "ministral3"),
        ("ministral3", "ministral3"),
    ],
)
def test_model_type(name: str, model_type: str) -> None:
    written = huggingface_config(CONFIGS[name], dtype=torch.bfloat16)
    assert written["model_type"] == model_type
    assert written["architectures"] == [f"{model_type.capitalize()}ForCausalLM"]
    assert ("layer_types" in written) == (model_type == "ministral")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert written["dtype"] == "bfloat16" and "dtype" not in huggingface_config(CONFIGS[name])


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (native_params, {"yarn": replace(YARN, truncate=False)}, "params.json .* yarn: .*truncate"),
        (native_params, {"yarn": replace(YARN, attention_factor=1.5)}, "params.json .* yarn: "),
        (native_params, {"layers": 1025}, "params.json .* n_layers: expected an integer from 1"),
        (huggingface_config, {"windows": (4, 5)}, r"windows: \(4, 5\) would be read as \(4, 4\)"),
        (
            huggingface_config,
            {"windows": (4, None), "experts": 2, "top_k": 1},
            "config.json cannot express this model: windows: mixtral has one for all layers",
        ),
        (
            huggingface_config,
            {"experts": 2, "top_k": 1, "q_scale": QueryScale(0.1, 8)},
            "q_scale: mixtral scales no queries",
        ),
        (
            huggingface_config,
            {"windows": (4, None), "q_scale": QueryScale(0.1, 8)},
            "windows: ministral3, which scales queries, has one window for all layers",
        ),
        (
            huggingface_config,
            {"yarn": YARN, "q_scale": QueryScale(0.1, 8)},
            "q_scale: .*original_max_positions=8.* would be read as .*=16384",
        ),
    ],
)
def test_what_a_file_cannot_express_is_refused(write, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        write(tiny(**changes))
