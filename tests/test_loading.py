"""Every form in which checkpoints were released loads to the same model, and quickly."""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
import transformers
from checkpoints import native_tensors, parameters_of, tiny_config
from released_formats import first_mixtral_tensors, write_bins, write_pickles
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_kernels import ModelConfig, Transformer
from mistral_kernels.model.weight_table import checkpoint_table
from mistral_kernels.model.weights import Checkpoint

DENSE, MOE = tiny_config(), tiny_config(experts=3, top_k=2)
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "vocab_size": 32,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def assert_loads(folder: Path, expected: dict[str, Tensor], **arguments) -> Transformer:
    model = Transformer.from_folder(folder, device="cpu", **arguments)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    return model


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_native_pickles(tmp_path: Path, config: ModelConfig, dtype: torch.dtype, files: int):
    tensors = native_tensors(config, dtype=dtype)
    write_pickles(tmp_path, config, tensors, files=files)
    assert_loads(tmp_path, parameters_of(tensors, config), allow_pickle=True)


def test_pickles_under_both_endings(tmp_path: Path):
    tensors = native_tensors(DENSE)
    write_pickles(tmp_path, DENSE, tensors)
    shutil.copy(tmp_path / "consolidated.00.pth", tmp_path / "consolidated.00.pt")
    assert_loads(tmp_path, parameters_of(tensors, DENSE), allow_pickle=True)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_first_release_of_mixtral(tmp_path: Path, suffix: str, files: int):
    tensors = native_tensors(MOE, dtype=torch.bfloat16)
    write_pickles(tmp_path, MOE, first_mixtral_tensors(tensors, MOE), files=files)
    for path in tmp_path.glob("*.pth"):
        path.rename(path.with_suffix(suffix))
    assert_loads(tmp_path, parameters_of(tensors, MOE), allow_pickle=True)


def test_first_release_of_mixtral_as_safetensors(tmp_path: Path):
    tensors = native_tensors(MOE)
    released = first_mixtral_tensors(tensors, MOE)
    checkpoints.write_native(tmp_path, MOE, {k: t.contiguous() for k, t in released.items()})
    assert_loads(tmp_path, parameters_of(tensors, MOE))


@pytest.mark.parametrize("files", [1, 3])
def test_huggingface_pickles(tmp_path: Path, files: int):
    written = checkpoints.write_huggingface(tmp_path / "safetensors", MOE)
    expected = Transformer.from_folder(tmp_path / "safetensors", device="cpu")
    write_bins(tmp_path / "bin", MOE, written, files=files)
    expected = dict(expected.named_parameters())
    assert_loads(tmp_path / "bin", expected, allow_pickle=True)
    # With params.json beside them they are still the only weights.
    (tmp_path / "bin" / "params.json").write_text(json.dumps(checkpoints.native_params(MOE)))
    assert_loads(tmp_path / "bin", expected, allow_pickle=True)


def test_safetensors_win_over_pickles(tmp_path: Path):
    tensors = checkpoints.write_native(tmp_path, DENSE)
    (tmp_path / "consolidated.00.pth").write_bytes(b"never read")
    assert_loads(tmp_path, parameters_of(tensors, DENSE), allow_pickle=True)


def test_views_in_a_pickle(tmp_path: Path):
    """torch.save keeps strides, and tensors of one storage stay one."""
    tensors = native_tensors(DENSE)
    strided = {k: t.T.contiguous().T if t.dim() == 2 else t for k, t in tensors.items()}
    write_pickles(tmp_path, DENSE, strided)
    assert_loads(tmp_path, parameters_of(tensors, DENSE), allow_pickle=True)


def test_native_text_part_of_a_multimodal_model(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = native_tensors(DENSE)
    vision = (
        "vision_encoder.patch_conv.weight",
        "vision_encoder.transformer.layers.0.attention.wq.weight",
        "vision_language_adapter.w_in.bias",
        "pre_mm_projector_norm.weight",
        "patch_merger.merging_layer.weight",
    )
    checkpoints.write_native(tmp_path, DENSE, tensors | {key: torch.ones(3) for key in vision})
    params = json.loads((tmp_path / "params.json").read_text())
    params["vision_encoder"] = {"hidden_size": 16, "image_token_id": 10}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with caplog.at_level("INFO", logger="mistral_kernels"):
        assert_loads(tmp_path, parameters_of(tensors, DENSE))
    assert "skipped 5 tensors that a text model does not use" in caplog.text


def multimodal(folder: Path, wrapper: str, **changes) -> transformers.PreTrainedModel:
    """Saves a tiny model with a vision tower, as transformers does."""
    config = getattr(transformers, f"{wrapper}Config")(
        vision_config=transformers.PixtralVisionConfig(**VISION),
        text_config=transformers.MistralConfig(**TEXT),
        **changes,
    )
    model = getattr(transformers, f"{wrapper}ForConditionalGeneration")(config).eval()
    model.save_pretrained(folder)
    return model


def same_logits(folder: Path, model: transformers.PreTrainedModel) -> bool:
    ids = torch.arange(1, 20)
    theirs = model(ids[None]).logits[0]
    ours = Transformer.from_folder(folder, device="cpu").forward(ids, [len(ids)])
    return torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapper", ["Mistral3", "Llava"])
@pytest.mark.parametrize("names", ["saved", "in memory"])
@torch.no_grad()
def test_text_part_of_a_multimodal_model(tmp_path: Path, names: str, wrapper: str, tied: bool):
    model = multimodal(tmp_path, wrapper, tie_word_embeddings=tied)
    if names == "in memory":
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
    assert same_logits(tmp_path, model)


@pytest.mark.parametrize("stored", [False, True])
@torch.no_grad()
def test_multimodal_config_that_is_silent_on_ties(tmp_path: Path, stored: bool):
    """Files from before transformers 5 say nothing: an output in them counts, else it is tied."""
    multimodal(tmp_path, "Mistral3", tie_word_embeddings=not stored)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["tie_word_embeddings"]
    del values["text_config"]["tie_word_embeddings"]
    path.write_text(json.dumps(values))
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any("lm_head" in key for key in keys) == stored
    reloaded = transformers.Mistral3ForConditionalGeneration.from_pretrained(tmp_path)
    assert same_logits(tmp_path, reloaded)
    assert Checkpoint(tmp_path, ModelConfig.from_folder(tmp_path)).config.tied_embeddings != stored


def test_llava_takes_the_ties_of_its_text_part():
    text = transformers.MistralConfig(**TEXT, tie_word_embeddings=True)
    config = transformers.LlavaConfig(text_config=text).to_dict()
    for top in (False, True):
        for wrapper in ("llava", "pixtral"):
            values = config | {"tie_word_embeddings": top, "model_type": wrapper}
            assert ModelConfig.from_huggingface(values).tied_embeddings


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("write", [checkpoints.write_native, write_pickles])
def test_files_are_closed(tmp_path: Path, write: Callable):
    write(tmp_path, DENSE, native_tensors(DENSE))
    model = Transformer.from_folder(tmp_path, device="cpu", allow_pickle=True)
    assert len(model.layers) == 2
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_loading_is_no_slower_than_reading(tmp_path: Path):
    """The benchmark measures; this is a bound that holds on a busy machine too."""
    config = tiny_config(hidden=1024, ffn_dim=8192, vocab=8192, layers=3)
    table = checkpoint_table(config)
    zeros = {key: torch.zeros(place.shape, dtype=torch.bfloat16) for key, place in table.items()}
    checkpoints.write_native(tmp_path, config, zeros, shards=4)
    files = sorted(tmp_path.glob("*.safetensors"))

    def seconds(call: Callable) -> float:
        begin = time.perf_counter()
        kept = call()
        duration = time.perf_counter() - begin
        assert kept
        return duration

    best = [math.inf, math.inf]
    for _ in range(20):  # whatever else the machine does takes some of the turns
        loading = seconds(lambda: Transformer.from_folder(tmp_path, device="cpu"))
        reading = seconds(lambda: [path.read_bytes() for path in files])
        best = [min(best[0], loading), min(best[1], reading)]
        if best[0] <= 1.3 * best[1]:
            return
    raise AssertionError(f"{best[0]:.3f} s against {best[1]:.3f} s")
