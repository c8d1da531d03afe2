"""Checkpoint: every tensor of every layout lands in its place."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from mistral_kernels.model.checkpoint_files import read_headers, read_into
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.weights import Checkpoint, parameter_shapes

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "vocab_size": 32,
    "pad_token_id": None,
}
DENSE, MOE = checkpoints.tiny_config(), checkpoints.tiny_config(experts=3, top_k=2)
TIED = checkpoints.tiny_config(tied_embeddings=True)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    config = ModelConfig.from_folder(folder)
    parameters = {
        name: torch.full(shape, float("nan"), dtype=dtype)
        for name, shape in parameter_shapes(config).items()
    }
    Checkpoint(folder, config).copy_to(parameters)
    return parameters


def assert_equal(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def parameters_of_state(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The model's parameters, from what transformers 5 holds in memory."""
    found = {
        "tok_embeddings": state["model.embed_tokens.weight"],
        "norm": state["model.norm.weight"],
    }
    for n in range(layers):
        layer = {k.removeprefix(f"model.layers.{n}."): v for k, v in state.items()}
        qkv = [layer[f"self_attn.{x}_proj.weight"] for x in "qkv"]
        parameters = {
            "attention_norm": layer["input_layernorm.weight"],
            "ffn_norm": layer["post_attention_layernorm.weight"],
            "attention.wqkv": torch.cat(qkv),
            "attention.wo": layer["self_attn.o_proj.weight"],
        }
        if "mlp.gate.weight" in layer:
            parameters["feed_forward.gate"] = layer["mlp.gate.weight"]
            parameters["feed_forward.w13"] = layer["mlp.experts.gate_up_proj"]
            parameters["feed_forward.w2"] = layer["mlp.experts.down_proj"]
        else:
            gate_up = [layer[f"mlp.{x}_proj.weight"] for x in ("gate", "up")]
            parameters["feed_forward.w13"] = torch.cat(gate_up)
            parameters["feed_forward.w2"] = layer["mlp.down_proj.weight"]
        found |= {f"layers.{n}.{name}": tensor for name, tensor in parameters.items()}
    return found


@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Mistral", "Mixtral", "Ministral", "Ministral3"])
def test_what_transformers_saves(
    tmp_path: Path, family: str, tied: bool, max_shard_size: str
) -> None:
    changes = {"num_local_experts": 3} if family == "Mixtral" else {}
    config = getattr(transformers, f"{family}Config")(**TINY, **changes, tie_word_embeddings=tied)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    expected = parameters_of_state(model.state_dict(), layers=2)
    if not tied:
        expected["output"] = model.lm_head.weight
    assert_equal(load(tmp_path), expected)


def test_text_part_of_a_multimodal_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = transformers.Mistral3Config(
        vision_config=vision,
        text_config=transformers.MistralConfig(**TINY),
        tie_word_embeddings=False,
    )
    model = transformers.Mistral3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    state = model.model.language_model.state_dict(prefix="model.")
    expected = parameters_of_state(state, layers=2) | {"output": model.lm_head.weight}
    with caplog.at_level("INFO", logger="mistral_kernels"):
        assert_equal(load(tmp_path), expected)
    assert len(caplog.records) == 1 and "tensors that a text model does not use" in caplog.text

    # The names that transformers 5 has in memory.
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_equal(load(tmp_path), expected)


def test_stacked_experts(tmp_path: Path) -> None:
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=3))
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    expected = parameters_of_state(model.state_dict(), layers=2)
    assert_equal(load(tmp_path), expected | {"output": model.lm_head.weight})


@pytest.mark.parametrize("write", [checkpoints.write_native, checkpoints.write_huggingface])
@pytest.mark.parametrize("config", [DENSE, MOE, TIED], ids=["dense", "moe", "tied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_both_layouts(tmp_path: Path, write: Callable, config: ModelConfig, shards: int) -> None:
    written = write(tmp_path, config, shards=shards)
    native = checkpoints.native_tensors(config)
    expected = checkpoints.parameters_of(native, config)
    if write is checkpoints.write_huggingface:
        for n in range(config.layers):
            q, k = (written[f"model.layers.{n}.self_attn.{x}_proj.weight"] for x in "qk")
            v = native[f"layers.{n}.attention.wv.weight"]
            expected[f"layers.{n}.attention.wqkv"] = torch.cat((q, k, v))
    assert_equal(load(tmp_path), expected)


def test_both_layouts_differ_only_in_wq_and_wk(tmp_path: Path) -> None:
    checkpoints.write_native(tmp_path / "native", MOE)
    checkpoints.write_huggingface(tmp_path / "huggingface", MOE)
    native, huggingface = load(tmp_path / "native"), load(tmp_path / "huggingface")
    differing = {name for name in native if not torch.equal(native[name], huggingface[name])}
    assert differing == {f"layers.{n}.attention.wqkv" for n in range(2)}


def test_dtype_is_that_of_the_matrices_and_values_are_converted(tmp_path: Path) -> None:
    tensors = checkpoints.native_tensors(DENSE, dtype=torch.bfloat16)
    tensors = {k: t.float() if "norm" in k else t for k, t in tensors.items()}
    checkpoints.write_native(tmp_path, DENSE, tensors)
    checkpoint = Checkpoint(tmp_path, DENSE)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    widened = {key: tensor.double() for key, tensor in tensors.items()}
    assert_equal(load(tmp_path, torch.float64), checkpoints.parameters_of(widened, DENSE))


def test_what_is_read_without_a_mapping(tmp_path: Path) -> None:
    tensors = checkpoints.write_native(tmp_path, DENSE, dtype=torch.bfloat16)
    stored = read_headers([tmp_path / "consolidated.safetensors"])["output.weight"]
    expected = tensors["output.weight"]
    whole = torch.zeros(40, 24, dtype=torch.bfloat16)
    assert read_into(whole[4:36], stored) and torch.equal(whole[4:36], expected)
    assert not whole[:4].any() and not whole[36:].any()
    for other in (torch.zeros(32, 24), torch.zeros(24, 32, dtype=torch.bfloat16).T):
        assert not read_into(other, stored) and not other.any()
    short = stored._replace(offset=stored.path.stat().st_size - 8)
    with pytest.raises(ValueError, match="output.weight: the file ends before the tensor"):
        read_into(whole[:32], short)


def test_output_beside_a_tied_embedding(tmp_path: Path) -> None:
    tensors = checkpoints.native_tensors(TIED)
    copy = {"output.weight": tensors["tok_embeddings.weight"].clone()}
    checkpoints.write_native(tmp_path, TIED, tensors | copy)
    assert_equal(load(tmp_path), checkpoints.parameters_of(tensors, TIED))
    copy["output.weight"][-1, -1] += 1
    checkpoints.write_native(tmp_path, TIED, tensors | copy)
    with pytest.raises(ValueError, match="output.weight: differs from tok_embeddings.weight"):
        load(tmp_path)


def test_no_progress_bar_away_from_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    checkpoints.write_native(tmp_path, DENSE)
    load(tmp_path)
    assert capfd.readouterr() == ("", "")
