"""`mistral-kernels quantize`: what it writes, who reads that, what it refuses, how it goes on."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from command_line import assert_refused, run_cli
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from test_saving_errors import contents, fail_on_call, largest_file
from transformers import AutoModelForCausalLM

from mistral_kernels import Transformer
from mistral_kernels.model import TINY_MIXTRAL, quantising
from mistral_kernels.model.compressed_tensors import stored_weight
from mistral_kernels.model.quantising import quantise_folder
from mistral_kernels.model.staged_folder import staging_place

DATA = Path(__file__).parent / "data"
FORMATS = {"int4": ["--group-size", 32], "int8": [], "fp8": []}
DENSE = checkpoints.tiny_config(hidden=64, ffn_dim=96, head_dim=16)


def quantize(source: Path, folder: Path, format: str, *options: object) -> str:
    """Run the command, which must succeed without a word on stderr, and return its line."""
    ended = run_cli("quantize", source, folder, "--format", format, "--device", "cpu", *options)
    assert (ended.status, ended.err) == (0, ""), ended.err
    return ended.out


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Every matrix of a folder, as compressed-tensors' own code reads it."""
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(described)
    scheme = config.config_groups["group_0"]
    read = BaseCompressor.get_value_from_registry(config.format).decompress
    tensors, found = tensors_in(folder), {}
    for key in tensors:
        if key.endswith("weight_scale"):
            owner = key.removesuffix("weight_scale")
            own = {k.removeprefix(owner): t for k, t in tensors.items() if k.startswith(owner)}
            found[f"{owner}weight"] = read(own, scheme)["weight"]
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_the_embedded_model_reads_back_in_compressed_tensors(tmp_path, format):
    said = quantize(TINY_MIXTRAL, tmp_path / "q", format, *FORMATS[format])
    assert said.startswith(f"{tmp_path / 'q'}: {format}, 4.63 MiB became ")
    source = Transformer.from_folder(TINY_MIXTRAL, device="cpu")
    source.save_pretrained(tmp_path / "full", layout="huggingface")
    full, stored, theirs = (
        tensors_in(tmp_path / "full"),
        tensors_in(tmp_path / "q"),
        decompressed(tmp_path / "q"),
    )
    assert len(theirs) == 4 * (4 + 4 * 3)
    for key, weight in theirs.items():
        ours = stored_weight(key, stored).dequantise(weight.dtype)
        assert weight.dtype == torch.bfloat16 and torch.equal(ours, weight), key
        limit = {"int4": 0.1, "int8": 0.01, "fp8": 0.04}[format]
        assert (weight - full[key]).norm() < limit * full[key].norm(), key
    for key in full.keys() - theirs.keys():  # embeddings, norms, routers
        assert torch.equal(stored[key], full[key])
    assert (tmp_path / "q" / "tokenizer.model.v1").exists()
    model = Transformer.from_folder(tmp_path / "q", device="cpu")
    assert model.quantisation and model.tokenizer


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", ["native", "huggingface"])
def test_a_dense_model_runs_in_transformers(tmp_path, format, layout):
    write = {"native": checkpoints.write_native, "huggingface": checkpoints.write_huggingface}
    write[layout](tmp_path / "full", DENSE, dtype=torch.bfloat16)
    quantise_folder(tmp_path / "full", tmp_path / "q", format=format, **_groups(format))
    weights = decompressed(tmp_path / "q")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 3, 7, 2, 9]])
    with torch.no_grad():
        logits = theirs(ids).logits[0]
    state = theirs.state_dict()
    for key, weight in weights.items():
        assert torch.equal(state[key].to(weight.dtype), weight), key
    ours = Transformer.from_folder(tmp_path / "q", device="cpu", dtype=torch.float32)
    assert torch.allclose(ours.forward(ids[0], [6]), logits, atol=1e-3)


def _groups(format: str) -> dict[str, int]:
    return {"group_size": 32} if format == "int4" else {}


def test_the_configuration_is_theirs(tmp_path):
    for format in FORMATS:
        quantise_folder(TINY_MIXTRAL, tmp_path / format, format=format, **_groups(format))
        found = json.loads((tmp_path / format / "config.json").read_text())["quantization_config"]
        for key, value in {"sparsity_config": {}, "transform_config": {}}.items():
            assert found.pop(key) == value
        assert found.pop("version")
        assert QuantizationConfig.model_validate(found).model_dump() == found
        assert found["ignore"] == [
            *(f"model.layers.{n}.block_sparse_moe.gate" for n in range(4)),
            "lm_head",
        ]


def spoilt(folder: Path, name: str) -> Path:
    """A copy of the embedded model without one of its files."""
    shutil.copytree(TINY_MIXTRAL, folder)
    (folder / name).unlink()
    return folder


def test_what_is_refused(tmp_path):
    low_bit, target = tmp_path / "low", tmp_path / "q"
    quantise_folder(TINY_MIXTRAL, low_bit, format="int8")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    wordless = spoilt(tmp_path / "wordless", "tokenizer.model.v1")
    texts = DATA / "calibration.txt"
    w2 = "model.layers.0.block_sparse_moe.experts.0.w2.weight: its 320 columns are no multiple"
    before = contents(tmp_path)
    for source, options, parts in (
        (TINY_MIXTRAL, [], ["--format"]),
        (TINY_MIXTRAL, ["--format", "int3"], ["--format", "int3", "int4"]),
        (TINY_MIXTRAL, ["--format", "int4"], [w2, "128, the group size"]),
        (TINY_MIXTRAL, ["--format", "int4", "--group-size", 40], ["group_size", "of 16", "40"]),
        (TINY_MIXTRAL, ["--format", "int4", "--group-size", -1], ["group_size", "of 16", "-1"]),
        (TINY_MIXTRAL, ["--format", "fp8", "--group-size", 32], ["one scale a row", "32"]),
        (low_bit, ["--format", "int8"], [str(low_bit), "few bits already", "8 bits"]),
        ("/nowhere", ["--format", "int8"], ["/nowhere: no such folder"]),
        (wordless, ["--format", "int8", "--calibration", texts], ["wordless: no tokenizer"]),
        *(
            (TINY_MIXTRAL, ["--format", "int8", "--calibration", tmp_path / name], [name, why])
            for name, why in (("none", "No such"), ("empty", "is empty"), ("latin", "not UTF-8"))
        ),
    ):
        assert_refused(run_cli("quantize", source, target, "--device", "cpu", *options), *parts)
    taken = run_cli("quantize", TINY_MIXTRAL, low_bit, "--format", "int8")
    assert_refused(taken, str(low_bit), "not empty", "--overwrite")
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="calibration: expected texts, got none"):
        quantise_folder(TINY_MIXTRAL, target, format="int8", calibration=[])


def test_weights_that_are_not_finite(tmp_path):
    """What came of them would be refused when it is loaded."""
    tensors = checkpoints.native_tensors(DENSE)
    tensors["layers.1.feed_forward.w3.weight"][5, 7] = torch.nan
    checkpoints.write_native(tmp_path / "full", DENSE, tensors)
    key = "model.layers.1.mlp.up_proj.weight: holds values that are not finite"
    with pytest.raises(ValueError, match=f"{tmp_path / 'full'}: {key}"):
        quantise_folder(tmp_path / "full", tmp_path / "q", format="int8")


def test_overwriting_and_a_bar(tmp_path):
    quantize(TINY_MIXTRAL, tmp_path / "q", "int8")
    # An attempt that was killed before it could remove what it had replaced.
    shutil.copytree(tmp_path / "q", tmp_path / ".old-q")
    ended = run_cli(
        *("quantize", TINY_MIXTRAL, tmp_path / "q", "--format", "int4", "--group-size", 0),
        *("--overwrite", "--device", "cpu"),
        terminal=True,
    )
    assert ended.status == 0, ended.err
    assert list(tmp_path.iterdir()) == [tmp_path / "q"]
    model = Transformer.from_folder(tmp_path / "q", device="cpu")
    assert "4 bits, a scale for each row" in model.quantisation


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from mistral_kernels.model import new_folder, quantising, staged_folder

def dying(function, number):
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

torch.set_num_threads(1)
source, root, texts = sys.argv[1], Path(sys.argv[2]), sys.argv[3].splitlines()
# The plan, the first file, a layer written but not renamed, one complete, index, last renaming.
moments = [("sync", 1, True), ("sync", 3, True), ("save_file", 2, False), ("sync", 6, False)]
moments += [("write_json", 1, False), ("put_in_place", 1, True), ("put_in_place", 1, False)]
for n, (name, number, before) in enumerate(moments):
    folder = root / str(n)
    child = os.fork()
    if child == 0:
        owner = {"save_file": quantising, "write_json": quantising}.get(name, staged_folder)
        setattr(owner, name, dying(getattr(owner, name), number))
        quantising.quantise_folder(
            source, folder, format="int4", group_size=32, calibration=texts, device="cpu"
        )
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
    assert folder.exists() == (n == len(moments) - 1), name
    if not folder.exists():
        quantising.quantise_folder(
            source, folder, format="int4", group_size=32, calibration=texts, device="cpu"
        )
quantising.quantise_folder(
    source, root / "whole", format="int4", group_size=32, calibration=texts, device="cpu"
)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills with SIGKILL")
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path_factory, tmp_path):
    sizes = {"hidden": 32, "ffn_dim": 64, "vocab": 2048, "experts": 2, "top_k": 2}
    source = tmp_path_factory.mktemp("source")
    checkpoints.write_native(source, checkpoints.tiny_config(**sizes), dtype=torch.bfloat16)
    shutil.copy(TINY_MIXTRAL / "tokenizer.model.v1", source)
    lines = (DATA / "calibration.txt").read_text().splitlines()[:4]
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path), "\n".join(lines)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digests = {}
    for folder in tmp_path.iterdir():
        files = contents(folder).items()
        digest = {Path(name).name: hashlib.sha256(data).hexdigest() for name, data in files}
        digests[folder.name] = digest
    assert digests.keys() == {*map(str, range(7)), "whole"}  # and nothing is left beside them
    for name, digest in digests.items():
        assert digest == digests["whole"], name


def test_full_disk_and_failures_leave_what_is_done(tmp_path, monkeypatch):
    target = tmp_path / "q"
    with pytest.raises(OSError, match=f"{target}: not quantised .*File too large"):
        with largest_file(400_000):  # the embedding is larger
            quantise_folder(TINY_MIXTRAL, target, format="int8")
    assert [path.name for path in staging_place(target).iterdir()] == [".plan.json"]
    fail_on_call(monkeypatch, quantising, "save_file", 3, KeyboardInterrupt())
    ended = run_cli("quantize", TINY_MIXTRAL, target, "--format", "int8", "--device", "cpu")
    assert ended.status == 130 and ended.err.count("\n") == 1
    assert f"{staging_place(target)} holds what is done; the same command goes on" in ended.err
    monkeypatch.undo()
    done = sorted(path.name for path in staging_place(target).iterdir())
    assert done == [".plan.json", *(f"model-0000{i}-of-00005.safetensors" for i in (1, 2))]
    other = run_cli("quantize", TINY_MIXTRAL, target, "--format", "fp8", "--device", "cpu")
    assert_refused(other, "unfinished work of another format, 'int8' and not 'fp8'")
    with held(staging_place(target)):
        beside = run_cli("quantize", TINY_MIXTRAL, target, "--format", "int8", "--device", "cpu")
    assert_refused(beside, "another process is at work there")
    # What is done is not done again.
    calls = []
    write = quantising.save_file
    monkeypatch.setattr(quantising, "save_file", lambda *a, **k: (calls.append(a), write(*a, **k)))
    quantize(TINY_MIXTRAL, target, "int8")
    assert len(calls) == 3 and list(tmp_path.iterdir()) == [target]


@contextlib.contextmanager
def held(folder: Path):
    """Another process has the lock of a folder."""
    code = (
        "import fcntl, os, sys\nfcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield
        process.stdin.close()


def test_a_change_of_the_source_is_noticed(tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(TINY_MIXTRAL, source)
    fail_on_call(monkeypatch, quantising, "save_file", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(source, tmp_path / "q", format="int8")
    monkeypatch.undo()
    os.utime(source / "consolidated.safetensors", (1, 1))
    with pytest.raises(FileExistsError, match="unfinished work of another files"):
        quantise_folder(source, tmp_path / "q", format="int8")
