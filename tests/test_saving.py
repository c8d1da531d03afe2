"""save_pretrained: either layout from either layout, bit for bit, and loadable by transformers."""

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from command_line import Terminal
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import feed, random_model, random_prompts
from torch import Tensor
from transformers import AutoModelForCausalLM

from mistral_kernels import Transformer
from mistral_kernels.model.config import ModelConfig, QueryScale, Yarn
from mistral_kernels.tolerance import error, fp32_limit

YARN = Yarn(4.0, 8, 2.0, 0.25, attention_factor=1.0)
FAMILIES = {
    "dense": checkpoints.tiny_config(windows=(None, None), max_positions=64),
    "window": checkpoints.tiny_config(),
    "mixtral": checkpoints.tiny_config(windows=(None, None), experts=5, top_k=2),
    "mixtral-window": checkpoints.tiny_config(experts=3, top_k=2),
    "ministral": checkpoints.tiny_config(windows=(None, 4), head_dim=16),
    "ministral3": checkpoints.tiny_config(
        windows=(None, None), yarn=YARN, q_scale=QueryScale(0.1, 8), tied_embeddings=True
    ),
    "q_scale": checkpoints.tiny_config(q_scale=QueryScale(0.1, 8)),
    "mixtral-yarn": checkpoints.tiny_config(experts=3, top_k=2, yarn=YARN),
    "yarn-scaled": checkpoints.tiny_config(
        windows=(None, 4), yarn=Yarn(4.0, 8, 2.0, 0.25, attention_factor=1.25, truncate=False)
    ),
}
WRITE = {"native": checkpoints.write_native, "huggingface": checkpoints.write_huggingface}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("layout", WRITE)
@pytest.mark.parametrize("source", WRITE)
@pytest.mark.parametrize("name", ["window", "mixtral", "ministral", "ministral3"])
def test_any_layout_from_any(tmp_path: Path, name: str, source: str, layout: str) -> None:
    config = FAMILIES[name]
    WRITE[source](tmp_path / "source", config)
    expected = WRITE[layout](tmp_path / "expected", config)
    model = Transformer.from_folder(tmp_path / "source", device="cpu")
    model.save_pretrained(tmp_path / "saved", layout=layout)
    assert_bits(tensors_in(tmp_path / "saved"), expected)
    read = ModelConfig.from_folder(tmp_path / "saved")
    assert read == ModelConfig.from_folder(tmp_path / "expected")
    assert read.interleaved == (layout == "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_again(tmp_path: Path, dtype: torch.dtype) -> None:
    written = checkpoints.write_native(tmp_path / "0", FAMILIES["mixtral"], dtype=dtype)
    for step, layout in enumerate(["huggingface", "huggingface", "native", "native"]):
        model = Transformer.from_folder(tmp_path / f"{step}", device="cpu")
        model.save_pretrained(tmp_path / f"{step + 1}", layout=layout, max_shard_bytes=20_000)
    assert_bits(tensors_in(tmp_path / "4"), written)
    params = (tmp_path / "3" / "params.json").read_bytes()
    assert (tmp_path / "4" / "params.json").read_bytes() == params
    huggingface = tensors_in(tmp_path / "2")
    assert_bits(tensors_in(tmp_path / "1"), huggingface)
    assert_bits(huggingface, checkpoints.huggingface_tensors(written, FAMILIES["mixtral"]))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    checkpoints.write_native(tmp_path / "native", FAMILIES[name])
    ours = Transformer.from_folder(tmp_path / "native", device="cpu")
    ours.save_pretrained(tmp_path / "saved", layout="huggingface", max_shard_bytes=30_000)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, **eager
    )
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32
    (prompt,) = random_prompts([21])
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0]
    found = error(feed(ours, None, [prompt], [21])[0], expected)
    assert found.within(fp32_limit("reference")), found
    again = Transformer.from_folder(tmp_path / "saved", device="cpu")
    assert error(feed(again, None, [prompt], [21])[0], expected).within(fp32_limit("reference"))


@pytest.mark.parametrize("layout", WRITE)
def test_shards(tmp_path: Path, layout: str) -> None:
    model = random_model()
    model.save_pretrained(tmp_path, layout=layout, max_shard_bytes=20_000)
    stem = "consolidated" if layout == "native" else "model"
    index = json.loads((tmp_path / f"{stem}.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"{stem}-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert index["metadata"] == {"total_size": sum(p.nbytes for p in model.parameters())}
    for name in files:
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            keys = list(file.keys())
            assert set(keys) == {k for k, owner in index["weight_map"].items() if owner == name}
            assert sum(file.get_tensor(key).nbytes for key in keys) <= 20_000
    loaded = Transformer.from_folder(tmp_path, device="cpu")
    assert_bits(loaded.state_dict(), model.state_dict())


def test_one_file_needs_no_index_and_all_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "down"
    random_model().save_pretrained(folder)
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes.keys() == {"params.json", "consolidated.safetensors"}
    assert len(set(modes.values())) == 1
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tokenizer_and_token_ids_come_along(tmp_path: Path, caplog) -> None:
    source = tmp_path / "source"
    checkpoints.write_huggingface(source, FAMILIES["dense"])
    templates = {"chat_template.jinja", "chat_template.json"}
    names = {"tekken.json", "tokenizer.model.v3", "generation_config.json"} | templates
    for name in (*names, "README.md", "optimizer.bin"):
        (source / name).write_text(name)
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [2, 7]}
    (source / "config.json").write_text(json.dumps(config))
    model = Transformer.from_folder(source, device="cpu")
    model.save_pretrained(tmp_path / "hf", layout="huggingface")
    model.save_pretrained(tmp_path / "native")
    for folder, own in (("hf", "config.json"), ("native", "params.json")):
        found = {p.name: p.read_text() for p in (tmp_path / folder).iterdir() if p.name in names}
        assert found == {name: name for name in names}
        assert len(list((tmp_path / folder).iterdir())) == len(names | {own, "weights"})
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 7])
    source.rename(tmp_path / "moved")
    model.save_pretrained(tmp_path / "later")
    assert f"{source}: gone, so no tokenizer is saved" in caplog.text


def test_the_source_is_found_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    checkpoints.write_native(tmp_path / "source", FAMILIES["dense"])
    (tmp_path / "source" / "tekken.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    model = Transformer.from_folder("source", device="cpu")
    monkeypatch.chdir("/")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tekken.json").exists()


def test_progress_on_a_terminal_only(tmp_path: Path, monkeypatch, capfd) -> None:
    model = random_model()
    model.save_pretrained(tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")  # a dumb one has no bar
    model.save_pretrained(tmp_path / "watched")
    assert "saving" in terminal.getvalue() and capfd.readouterr().out == ""
