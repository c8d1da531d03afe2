"""Loading a checkpoint against reading its bytes, page cache warm.

The peers read the same files: "reading" into one small buffer that stays in the CPU's caches, which
is the least that can be done, and "reading to memory" into memory that keeps the bytes, as a model
has to. Fresh memory costs what the machine makes of it: a virtual machine may have to get it from
its host first.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.timing import Work
from mistral_kernels import Transformer
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.weight_table import checkpoint_table
from mistral_kernels.model.weights import Checkpoint

OP = "loading"
ROUNDS = 5
SHARDS = 4
BUFFER_BYTES = 1 << 20


class Shape(NamedTuple):
    layers: int
    hidden: int
    heads: int
    head_dim: int
    ffn_dim: int
    vocab: int


SHAPES = {
    "tiny": {"tiny": Shape(2, 32, 4, 8, 48, 64)},
    "cpu": {"dense-3gb": Shape(14, 2560, 20, 128, 10240, 32000)},
    "cuda": {},
}
QUICK = ()  # writes gigabytes


def config_of(shape: Shape) -> ModelConfig:
    layers, hidden, heads, head_dim, ffn_dim, vocab = shape
    sizes = {"layers": layers, "hidden": hidden, "q_heads": heads, "kv_heads": heads // 4}
    sizes |= {"head_dim": head_dim, "ffn_dim": ffn_dim, "vocab": vocab}
    return ModelConfig(**sizes, norm_eps=1e-5, rope_theta=1e4, windows=(None,) * layers)


def write_shards(folder: Path, config: ModelConfig, dtype: torch.dtype) -> list[Path]:
    """Write random weights of that model, native, as equal numbers of tensors a file."""
    block = torch.randn(1 << 22).to(dtype)
    places = list(checkpoint_table(config).items())
    files = []
    for i in range(SHARDS):
        tensors = {}
        for key, place in places[i::SHARDS]:
            size = torch.Size(place.shape).numel()
            tensors[key] = block.repeat(-(-size // len(block)))[:size].view(place.shape)
        files.append(folder / f"consolidated-{i + 1:05}-of-{SHARDS:05}.safetensors")
        save_file(tensors, files[-1])
    return files


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path, which keeps the folders of several runs.
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_loading(bench, folder, shape, dtype):
    if dtype != torch.bfloat16:
        pytest.skip("checkpoints are published in bfloat16")
    config = config_of(shape)
    files = write_shards(folder, config, dtype)
    buffer = bytearray(BUFFER_BYTES)

    def load() -> torch.Tensor:
        model = Transformer(config, device="cpu", dtype=dtype)
        Checkpoint(folder, config).copy_to(dict(model.named_parameters()))
        return model.norm.clone()

    def read() -> torch.Tensor:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return torch.zeros(0)

    def read_to_memory() -> torch.Tensor:
        kept = [path.read_bytes() for path in files]
        return torch.tensor(len(kept))

    peers = {"reading": read, "reading to memory": read_to_memory}
    work = Work(bytes=2 * Checkpoint(folder, config).nbytes, flops=0, writes=True)
    bench(load, tuple, work, peers, compare=False, rounds=ROUNDS)
