"""PEFT adapters: what PEFT saves of a tiny model, merged here, gives what PEFT itself merges."""

import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora import parameters_in
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mistral_kernels import ModelConfig, Transformer
from mistral_kernels.model.lora import Adapters

DENSE, MOE = checkpoints.tiny_config(), checkpoints.tiny_config(experts=3, top_k=2)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NO_MODULES: dict[str, Any] = {"target_modules": []}

CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "attention": (DENSE, {"target_modules": ATTENTION}),
    "dense mlp": (DENSE, {"target_modules": MLP, "use_rslora": True}),
    "all linear": (DENSE, {"target_modules": "all-linear", "bias": "lora_only"}),
    "one layer": (DENSE, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "embeddings": (DENSE, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "parameter": (DENSE, NO_MODULES | {"target_parameters": ["q_proj.weight"]}),
    "patterns": (
        DENSE,
        {
            "target_modules": ATTENTION + MLP,
            "rank_pattern": {r"layers\.1\.self_attn\.[qk]_proj": 5, "^model.layers.0.mlp.*": 1},
            "alpha_pattern": {"q_proj": 3, r"1\..*\.(up|gate)_proj": 0.5},
            "use_rslora": True,
        },
    ),
    "moe attention": (MOE, {"target_modules": ATTENTION}),
    "fused experts": (MOE, NO_MODULES | {"target_parameters": FUSED}),
    "fused experts, rslora": (
        MOE,
        {
            "target_modules": ["o_proj"],
            "target_parameters": FUSED,
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 1},
            "alpha_pattern": {"experts.gate_up_proj": 7},
        },
    ),
    "gate_up only": (MOE, NO_MODULES | {"target_parameters": FUSED[:1]}),
    "down only": (MOE, NO_MODULES | {"target_parameters": FUSED[1:]}),
    "router": (
        MOE,
        NO_MODULES | {"target_parameters": ["gate.weight"], "alpha_pattern": {"gate.weight": 2}},
    ),
    # PEFT itself turns the names of transformers 4 into parameters of transformers 5.
    "names of transformers 4": (MOE, {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"]}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in both layouts, an adapter by PEFT, and the model PEFT merged."""
    shape, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("peft")
    checkpoints.write_native(folder / "native", shape)
    checkpoints.write_huggingface(folder / "huggingface", shape)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **options)
    model = get_peft_model(peft_base(folder), config)
    model.save_pretrained(folder / "adapter")
    save_merged(model, folder)
    return folder


def peft_base(folder: Path) -> PreTrainedModel:
    # Eager experts: the grouped ones do not take float64.
    return AutoModelForCausalLM.from_pretrained(
        folder / "huggingface", dtype=torch.float64, experts_implementation="eager"
    )


def save_merged(model: PeftModel, folder: Path) -> None:
    """Saves what PEFT merges, and its logits of a few tokens."""
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    ids = torch.arange(7)
    torch.save(merged(ids[None]).logits[0].detach(), folder / "logits.pt")


@pytest.mark.parametrize("layout", ["native", "huggingface"])
def test_same_as_peft(case: Path, layout: str) -> None:
    model = Transformer.from_folder(case / layout, dtype=torch.float64, device="cpu")
    base = {name: tensor.clone() for name, tensor in model.named_parameters()}
    model.load_lora(case / "adapter")
    changed = {name for name, tensor in model.named_parameters() if (tensor != base[name]).any()}
    assert changed
    if layout == "huggingface":
        _, expected = parameters_in(case / "merged", torch.float64)
        for name, tensor in model.named_parameters():
            torch.testing.assert_close(tensor.data, expected[name], rtol=0, atol=1e-12)
    # The rows of wq and wk are in another order in a native model; its logits are not.
    logits = torch.load(case / "logits.pt", weights_only=True)
    torch.testing.assert_close(model(torch.arange(7), [7]).double(), logits, rtol=0, atol=5e-5)
    model.unload_lora(case / "adapter")
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, base[name])


def rename(folder: Path, pattern: str, replacement: str) -> None:
    """Renames the tensors of an adapter's file."""
    path = folder / "adapter_model.safetensors"
    tensors = {re.sub(pattern, replacement, key): t for key, t in load_file(path).items()}
    save_file(tensors, path)


def adapter_of(folder: Path, shape: ModelConfig, name: str = "adapter", **options: Any) -> Path:
    """A model in Hugging Face layout and a random adapter of it, written by PEFT."""
    checkpoints.write_huggingface(folder / "huggingface", shape)
    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False} | options
    get_peft_model(peft_base(folder), LoraConfig(**options)).save_pretrained(folder / name)
    return folder / name


def merged(
    folder: Path, *adapters: Path, layout: str = "huggingface", **options: float
) -> dict[str, Tensor]:
    """The float64 parameters of a model with adapters loaded."""
    config, parameters = parameters_in(folder / layout, torch.float64)
    loaded = Adapters()
    for adapter in adapters:
        loaded.load(parameters, config, adapter, **options)
    return parameters


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name].double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
def test_experts_named_one_by_one(tmp_path: Path, rslora: bool) -> None:
    """Files of transformers 4 and older PEFT, as PEFT itself reads them today."""
    targets = ["w1", "w2", "w3", "gate", "v_proj"]
    adapter = adapter_of(tmp_path, MOE, target_modules=["v_proj"], use_rslora=rslora)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"target_modules": targets}
    path.write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    native = checkpoints.native_tensors(MOE)
    for key, weight in checkpoints.huggingface_tensors(native, MOE).items():
        if "block_sparse_moe" in key:
            matrix = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{matrix}.lora_A.weight"] = torch.randn(2, weight.shape[1])
            tensors[f"{matrix}.lora_B.weight"] = torch.randn(weight.shape[0], 2)
    save_file(tensors, adapter / "adapter_model.safetensors")
    save_merged(PeftModel.from_pretrained(peft_base(tmp_path), adapter), tmp_path)
    _, expected = parameters_in(tmp_path / "merged", torch.float64)
    if rslora:
        # PEFT 0.21 fuses w1 and w3 to twice the rank and twice alpha. That keeps alpha / r, but
        # makes of alpha / sqrt(r) sqrt(2) times what the adapter was trained with.
        for name, base in merged(tmp_path).items():
            if name.endswith("w13"):
                expected[name] = base + (expected[name] - base) / 2**0.5
    assert_close(merged(tmp_path, adapter), expected)


def test_stacked_experts_before_peft_0_19_1(tmp_path: Path) -> None:
    """Rows of the stacked matrices were A's inputs: the update of expert e is (B_e A_e)^T."""
    adapter = adapter_of(tmp_path, MOE, target_modules=[], target_parameters=FUSED)
    tensors, expected = {}, merged(tmp_path)
    wrapping = {"w13": ".base_layer", "w2": ""}
    for name, weight in expected.items():
        layer, _, leaf = name.rpartition(".feed_forward.")
        if leaf in wrapping:
            experts, rows, columns = weight.shape
            a, b = torch.randn(2 * experts, rows), torch.randn(columns, 2 * experts)
            prefix = f"base_model.model.model.{layer}.mlp.experts{wrapping[leaf]}"
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
            a = a.double().reshape(experts, 2, rows)
            b = b.double().reshape(columns, 2, experts)
            expected[name] = weight + 3 * torch.einsum("ore,eri->eio", b, a)
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert_close(merged(tmp_path, adapter), expected)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"\.model\.layers", ".model.language_model.layers"),  # transformers 5
        (r"\.model\.layers", ".language_model.model.layers"),  # transformers 4
        (r"(lora_[AB])", r"\1.default"),
        (r"^base_model\.model\.", ""),
    ],
)
def test_other_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str, replacement: str
) -> None:
    adapter = adapter_of(tmp_path, DENSE, target_modules=["q_proj"])
    expected = merged(tmp_path, adapter)
    rename(adapter, pattern, replacement)
    path = adapter / "adapter_model.safetensors"
    vision = "base_model.model.model.vision_tower.transformer.layers.0.attention.q_proj.lora_A"
    save_file(load_file(path) | {f"{vision}.weight": torch.zeros(2, 5)}, path)
    with caplog.at_level("INFO", "mistral_kernels"):
        assert_close(merged(tmp_path, adapter), expected)
    assert "skipped 1 tensors" in caplog.text and vision in caplog.text
    assert f"an adapter for {tmp_path / 'huggingface'}" in caplog.text


def test_sum_of_peft_adapters(tmp_path: Path) -> None:
    one = adapter_of(tmp_path, MOE, "one", target_modules=["q_proj"], target_parameters=FUSED)
    two = adapter_of(
        tmp_path, MOE, "two", target_modules=["q_proj", "o_proj"], target_parameters=FUSED, r=3
    )
    model = PeftModel.from_pretrained(peft_base(tmp_path), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    model.merge_and_unload(adapter_names=["one", "two"]).save_pretrained(tmp_path / "merged")
    _, expected = parameters_in(tmp_path / "merged", torch.float64)
    assert_close(merged(tmp_path, one, two), expected)


def test_given_scaling_and_weight(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, DENSE, target_modules=ATTENTION, rank_pattern={"v_proj": 4})
    base, own = merged(tmp_path), merged(tmp_path, adapter)
    given = merged(tmp_path, adapter, scaling=1.5, weight=-2.0)
    q, v = slice(0, 32), slice(48, 64)  # rows of wqkv
    for name, tensor in given.items():
        if name.endswith("wqkv"):
            for rows, scaling in ((q, 6 / 2), (v, 6 / 4)):
                update = (own[name] - base[name])[rows] / scaling
                torch.testing.assert_close(tensor[rows], base[name][rows] - 3 * update)


def test_file_may_be_named(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, DENSE, target_modules=["q_proj"])
    assert_close(merged(tmp_path, adapter / "adapter_model.safetensors"), merged(tmp_path, adapter))
