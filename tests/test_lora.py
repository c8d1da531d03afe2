"""Native adapters: W + scaling * B @ A in either rope layout, all of an adapter or nothing."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.lora import Adapters
from mistral_kernels.model.weights import Checkpoint, parameter_shapes

GOLDEN = Path(__file__).parent / "golden" / "dense_w8_chunked"
DENSE, MOE = checkpoints.tiny_config(), checkpoints.tiny_config(experts=3, top_k=2)
KEY = "layers.0.attention.wq"


def adapter_for(tensors: dict[str, Tensor], rank: int = 3) -> dict[str, Tensor]:
    """A random adapter for every matrix that can have one."""
    adapter = {}
    for key, weight in tensors.items():
        matrix = key.removesuffix(".weight")
        if matrix.rpartition(".")[2] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"):
            adapter[f"{matrix}.lora_A.weight"] = torch.randn(rank, weight.shape[1])
            adapter[f"{matrix}.lora_B.weight"] = torch.randn(weight.shape[0], rank)
    return adapter


def merged_in_float64(
    tensors: dict[str, Tensor], adapter: dict[str, Tensor], scaling: float
) -> dict[str, Tensor]:
    merged = {key: tensor.double() for key, tensor in tensors.items()}
    for key in tensors:
        a, b = (adapter.get(key.replace("weight", f"lora_{x}.weight")) for x in "AB")
        if a is not None and b is not None:
            merged[key] = merged[key] + scaling * (b.double() @ a.double())
    return merged


def parameters_in(folder: Path, dtype: torch.dtype) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = ModelConfig.from_folder(folder)
    shapes = parameter_shapes(config)
    parameters = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    Checkpoint(folder, config).copy_to(parameters)
    return config, parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["native", "huggingface"])
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_merge(tmp_path: Path, shape: ModelConfig, layout: str, dtype: torch.dtype) -> None:
    tensors = checkpoints.native_tensors(shape, dtype=dtype)
    adapter = adapter_for(tensors)
    save_file(adapter, tmp_path / "lora.safetensors")
    merged = merged_in_float64(tensors, adapter, scaling=0.5)
    if layout == "native":
        checkpoints.write_native(tmp_path / "model", shape, tensors)
    else:
        # The adapter stays native; the model's own rows of wq and wk are in the other order.
        renamed = checkpoints.huggingface_tensors(tensors, shape)
        checkpoints.write_huggingface(tmp_path / "model", shape, renamed)
        checkpoints.write_huggingface(
            tmp_path / "merged", shape, checkpoints.huggingface_tensors(merged, shape)
        )
    if layout == "native":
        expected = checkpoints.parameters_of(merged, shape)
    else:
        _, expected = parameters_in(tmp_path / "merged", torch.float64)
    config, parameters = parameters_in(tmp_path / "model", dtype)
    Adapters().load(parameters, config, tmp_path, 0.5)
    # A sum computed in float32 (or float64), then at most one rounding to half a unit.
    exact = 1e-14 if dtype == torch.float64 else 1e-6
    rtol = 2**-8 if dtype == torch.bfloat16 else exact
    for name, tensor in parameters.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=rtol, atol=exact)


def test_golden_adapter() -> None:
    config, parameters = parameters_in(GOLDEN / "mistral", torch.float32)
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    Adapters().load(parameters, config, GOLDEN / "mistral" / "lora.safetensors")
    tensors = load_file(GOLDEN / "mistral" / "consolidated.safetensors")
    adapter = load_file(GOLDEN / "mistral" / "lora.safetensors")
    expected = checkpoints.parameters_of(merged_in_float64(tensors, adapter, 2.0), config)
    for name, tensor in parameters.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
    changed = {name for name in before if not torch.equal(before[name], parameters[name])}
    assert changed == {name for name in parameters if name.endswith((".wqkv", ".wo", "w13", "w2"))}


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        (f"{KEY}.lora_A.weight", None, "missing"),
        (f"{KEY}.lora_B.weight", None, "missing"),
        (f"{KEY}.lora_A.weight", torch.zeros(3, 23), r"expected shape \(3, 24\), got \(3, 23\)"),
        (f"{KEY}.lora_B.weight", torch.zeros(32, 4), r"expected shape \(32, 3\), got \(32, 4\)"),
        (f"{KEY}.lora_A.weight", torch.zeros(()), r"expected shape \(1, 24\), got \(\)"),
        (f"{KEY}.lora_A.weight", torch.zeros(3, 24).int(), "dtype I32 is not supported"),
        *(
            (
                f"{matrix}.lora_A.weight",
                torch.zeros(3, 24),
                "not an adapter of a matrix of this model",
            )
            for matrix in ("output", "layers.2.attention.wq", "layers.0.feed_forward.experts.0.w1")
        ),
        ("layers.0.attention.wq.weight", torch.zeros(32, 24), "not an adapter of a matrix"),
        (f"{KEY}.lora_A.weight", torch.full((3, 24), torch.nan), "holds values that are not"),
        (f"base_model.model.{KEY}.lora_A.weight", torch.zeros(3, 24), "not an adapter of a matrix"),
    ],
)
def test_refused_adapter_changes_nothing(
    tmp_path: Path, key: str, tensor: Tensor | None, message: str
) -> None:
    adapter = adapter_for(checkpoints.native_tensors(DENSE))
    if tensor is None:
        del adapter[key]
    else:
        adapter[key] = tensor
    path = tmp_path / "lora.safetensors"
    save_file(adapter, path)
    assert_refused(path, ValueError, f"{path}: {key}: {message}")


def assert_refused(path: Path, error: type[Exception], message: str, scaling: float = 2.0) -> None:
    parameters = checkpoints.parameters_of(checkpoints.native_tensors(DENSE), DENSE)
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    with pytest.raises(error, match=message):
        Adapters().load(parameters, DENSE, path, scaling)
    assert all(torch.equal(parameters[name], before[name]) for name in before)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf")])
def test_scaling_must_be_finite(tmp_path: Path, scaling: float) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(adapter_for(checkpoints.native_tensors(DENSE)), path)
    assert_refused(path, ValueError, "scaling: expected a finite number", scaling)


def test_params_beside_an_adapter_tell_its_scaling_and_rank(tmp_path: Path) -> None:
    """As mistral-finetune writes them; a file without them is that of a checkpoint."""
    tensors = checkpoints.native_tensors(DENSE)
    path, params = tmp_path / "lora.safetensors", tmp_path / "params.json"
    save_file(adapter_for(tensors), path)
    expected = checkpoints.parameters_of(
        merged_in_float64(tensors, load_file(path), scaling=0.5), DENSE
    )
    for scaling, content in (
        (None, {"lora": {"enable": True, "rank": 3, "dropout": 0.0, "scaling": 0.5}}),
        (0.5, {"lora": {"rank": 3, "scaling": 7.0}}),
        (0.5, checkpoints.native_params(DENSE)),
    ):
        params.write_text(json.dumps(content))
        parameters = checkpoints.parameters_of(tensors, DENSE)
        parameters = {name: tensor.clone() for name, tensor in parameters.items()}
        Adapters().load(parameters, DENSE, path, scaling)
        for name, tensor in parameters.items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
    for content, message in (
        ({"rank": 4}, r"lora.safetensors: .*: expected shape \(4, 24\), got \(3, 24\)"),
        ({"scaling": "2"}, r"params.json: lora\.scaling: expected a finite number > 0, got '2'"),
    ):
        params.write_text(json.dumps({"lora": content}))
        assert_refused(path, ValueError, message)


def test_file(tmp_path: Path) -> None:
    assert_refused(5, TypeError, "path: expected a path, got int")
    assert_refused(tmp_path, FileNotFoundError, "holds no lora.safetensors nor adapter_model")
    assert_refused(tmp_path / "absent", FileNotFoundError, "absent: no such file")
    path = tmp_path / "lora.safetensors"
    save_file({}, path)
    assert_refused(path, ValueError, "lora.safetensors: holds no lora_A and lora_B tensors")
    save_file(adapter_for(checkpoints.native_tensors(DENSE)), path)
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(path, ValueError, "lora.safetensors: truncated or not a safetensors file")
