"""PEFT adapters that cannot be merged: one error that names file and key, and no weight changed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.lora import Adapters

DENSE, MOE = checkpoints.tiny_config(), checkpoints.tiny_config(experts=3, top_k=2)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def pair(name: str, rows: int, columns: int, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{name}.lora_A.weight": torch.ones(rank, columns),
        f"{name}.lora_B.weight": torch.ones(rows, rank),
    }


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """Writes an adapter of layer 0's q_proj; `config` and `tensors` replace or add entries."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(pair(Q, 32, 24) | (tensors or {}), folder / "adapter_model.safetensors")
    return folder


def assert_refused(
    path: Path,
    message: str,
    error: type[Exception] = ValueError,
    shape: ModelConfig = DENSE,
) -> None:
    parameters = checkpoints.parameters_of(checkpoints.native_tensors(shape), shape)
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    with pytest.raises(error, match=message):
        Adapters().load(parameters, shape, path)
    assert all(torch.equal(parameters[name], before[name]) for name in before)


def test_the_plain_one_is_taken(tmp_path: Path) -> None:
    parameters = checkpoints.parameters_of(checkpoints.native_tensors(DENSE), DENSE)
    before = parameters["layers.0.attention.wqkv"].clone()
    Adapters().load(parameters, DENSE, write(tmp_path))
    added = parameters["layers.0.attention.wqkv"] - before
    torch.testing.assert_close(added[:32], torch.full((32, 24), 6.0))
    assert not added[32:].any()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type: expected one of LORA, got 'IA3'"),
        ("peft_type", None, "peft_type: missing"),
        ("r", None, "r: missing"),
        ("r", 0, "r: expected an integer from 1"),
        ("lora_alpha", float("nan"), "lora_alpha: expected a finite number > 0, got nan"),
        ("lora_alpha", "16", "lora_alpha: expected a finite number"),
        ("use_rslora", 1, "use_rslora: expected true or false"),
        ("rank_pattern", {"q_proj": 2.5}, r"rank_pattern\.q_proj: expected an integer"),
        ("rank_pattern", {"(": 2}, r"rank_pattern\.\(: no regular expression"),
        ("rank_pattern", [4], "rank_pattern: expected an object"),
        ("alpha_pattern", {"k": float("inf")}, r"alpha_pattern\.k: expected a finite number"),
        ("base_model_name_or_path", 5, "base_model_name_or_path: expected a name, got 5"),
        ("target_parameters", "experts", "target_parameters: expected a list of names"),
        ("use_dora", True, "use_dora: DoRA is not supported"),
        ("lora_bias", True, "lora_bias: the model has no biases"),
        ("modules_to_save", ["lm_head"], "modules_to_save: whole matrices cannot be merged"),
        ("trainable_token_indices", [3], "trainable_token_indices: single token embeddings"),
        ("layer_replication", [[0, 1]], "layer_replication: replicated layers"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens: an activated LoRA"),
        ("use_qalora", True, "use_qalora: QA-LoRA"),
        ("use_bdlora", {"nblocks": 2}, "use_bdlora: BD-LoRA"),
        ("arrow_config", {"top_k": 2}, "arrow_config: Arrow"),
        ("kasa_config", {"beta": 0.1}, "kasa_config: KaSA"),
        ("monteclora_config", {"x": 1}, "monteclora_config: MonteCLoRA"),
        ("velora_config", {"x": 1}, "velora_config: VeLoRA"),
        *(
            ("init_lora_weights", start, f"init_lora_weights: expected one of .*, got '{start}'")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ),
    ],
)
def test_config(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = write(tmp_path, **{key: value})
    assert_refused(folder, f"^{folder}/adapter_config.json: {message}")


@pytest.mark.parametrize(
    ("shape", "tensors", "config", "message"),
    [
        (DENSE, pair(Q, 32, 24, rank=3), {}, r"expected shape \(2, 24\), got \(3, 24\)"),
        (DENSE, pair(Q, 32, 24), {"r": 4}, r"expected shape \(4, 24\), got \(2, 24\)"),
        (DENSE, pair(Q, 40, 24), {}, r"expected shape \(32, 2\), got \(40, 2\)"),
        (DENSE, pair(Q, 32, 24), {"rank_pattern": {"q_proj": 1}}, r"expected shape \(1, 24\)"),
        (DENSE, pair(Q.replace("0", "2"), 32, 24), {}, "not an adapter of a matrix"),
        (DENSE, pair(EXPERTS, 24, 40), {}, "not an adapter of a matrix"),
        (DENSE, pair(f"{Q}.base_layer", 32, 24), {}, "not an adapter of a matrix"),
        (DENSE, pair("base_model.model.model.norm", 24, 24), {}, "not an adapter of a matrix"),
        (DENSE, pair("base_model.model.score", 2, 24), {}, "not an adapter of a matrix"),
        (DENSE, {f"{Q}.lora_magnitude_vector": torch.ones(32)}, {}, "not an adapter"),
        (DENSE, {f"{Q}.lora_B.bias": torch.ones(32)}, {}, "not an adapter of a matrix"),
        (DENSE, {f"{Q}.lora_A.weight": torch.ones(2, 24).int()}, {}, "dtype I32"),
        (DENSE, {f"{Q}.lora_B.weight": torch.full((32, 2), torch.inf)}, {}, "not finite"),
        (DENSE, {f"{Q}.lora_A.default.weight": torch.ones(2, 24)}, {}, "stored twice"),
        (DENSE, {f"{Q[:-1]}.lora_A.weight": torch.ones(2, 24)}, {}, "not an adapter"),
        (MOE, pair(EXPERTS, 24, 41, rank=6), {}, r"lora_A.weight: shapes \(6, 41\) of A"),
        (MOE, pair(EXPERTS, 24, 40, rank=4), {}, r"expected shape \(6, 40\), got \(4, 40\)"),
        (
            MOE,
            pair(EXPERTS, 24, 40, rank=6) | pair(f"{EXPERTS}.base_layer", 24, 40, rank=6),
            {},
            "changes the same matrix",
        ),
        # A resized embedding, and a trained output matrix, beside the low-rank updates.
        (
            DENSE,
            {"base_model.model.model.embed_tokens.weight": torch.ones(34, 24)},
            {},
            r"expected shape \(32, 24\), got \(34, 24\)",
        ),
        (
            DENSE,
            {"base_model.model.lm_head.weight": torch.ones(32, 24)},
            {},
            "lm_head.weight: differs from the model's",
        ),
        (
            checkpoints.tiny_config(tied_embeddings=True),
            {
                "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 32),
                "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(24, 2),
            },
            {},
            "embed_tokens: the output is tied to it",
        ),
    ],
)
def test_tensors(
    tmp_path: Path, shape: ModelConfig, tensors: dict[str, Tensor], config: dict, message: str
) -> None:
    folder = write(tmp_path, tensors, **config)
    assert_refused(folder, f"^{folder}/adapter_model.safetensors: .*{message}", shape=shape)


@pytest.mark.parametrize("factor", "AB")
def test_half_an_adapter(tmp_path: Path, factor: str) -> None:
    path = write(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"{Q}.lora_{factor}.weight"]
    save_file(tensors, path)
    assert_refused(tmp_path, f"^{path}: {Q}.lora_{factor}.weight: missing")


def test_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert_refused(folder, f"^{weights}: truncated or not a safetensors file")
    save_file({}, weights)
    assert_refused(folder, f"^{weights}: holds no lora_A and lora_B tensors")
    weights.write_bytes(data)
    save_file(pair("layers.0.attention.wq", 32, 24), folder / "lora.safetensors")
    assert_refused(folder, f"^{folder}: holds lora.safetensors and adapter_model.safetensors")
    (folder / "lora.safetensors").unlink()
    config.write_text("{")
    assert_refused(folder, f"^{config}: not valid JSON")
    config.unlink()
    assert_refused(folder, f"^{config}: no such file", FileNotFoundError)
    renamed = weights.rename(folder / "other.safetensors")
    assert_refused(renamed, f"^{renamed}: {Q}.lora_A.weight: .*PEFT's name")
    (folder / "adapter_model.bin").write_bytes(b"")
    assert_refused(folder, f"^{folder}/adapter_model.bin: pickles are not read")
    (folder / "adapter_model.bin").unlink()
    config.write_text(json.dumps(CONFIG))
    missing = f"^{folder}: holds no adapter_model.safetensors"
    assert_refused(folder, missing, FileNotFoundError)


def test_unknown_keys_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parameters = checkpoints.parameters_of(checkpoints.native_tensors(DENSE), DENSE)
    Adapters().load(parameters, DENSE, write(tmp_path, use_novelty=True, unused=None))
    assert "unknown keys are ignored: use_novelty" in caplog.text
    assert "unused" not in caplog.text


def test_another_base_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two models may have matrices of the same shapes: then only the name of the base tells."""
    other = replace(DENSE, rope_theta=1e6, windows=(None, None))
    published = {"org/this": replace(DENSE, interleaved=False, max_positions=9), "org/other": other}
    known = ModelConfig.known
    monkeypatch.setattr(ModelConfig, "known", lambda name: published.get(name) or known(name))
    for base, warning in (
        ("org/this", ""),
        ("org/other", f"{tmp_path}.*org/other, which differs from this model in rope_theta, wind"),
        ("someone/fine-tune", ""),
    ):
        parameters = checkpoints.parameters_of(checkpoints.native_tensors(DENSE), DENSE)
        caplog.clear()
        Adapters().load(parameters, DENSE, write(tmp_path, base_model_name_or_path=base))
        assert re.search(warning, caplog.text) and bool(caplog.text) == bool(warning)
