"""Loading a checkpoint takes the memory of the model, and refusing one takes none."""

import json
import subprocess
import sys
from pathlib import Path

import checkpoints
import low_bit_folders
import pytest
import torch

from mistral_kernels.model.weight_table import checkpoint_table

PEAK_MEMORY = """
import sys, threading, time, torch
from pathlib import Path
from mistral_kernels import ModelConfig, Transformer
from mistral_kernels.model.weights import Checkpoint

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

def sample():
    while not done.is_set():
        samples.append(anonymous_bytes())
        time.sleep(0.002)

torch.ones(64, 64, dtype=torch.bfloat16).copy_(torch.ones(64, 64))
before, samples, done = anonymous_bytes(), [], threading.Event()
sampler = threading.Thread(target=sample, daemon=True)
sampler.start()
config = ModelConfig.from_folder(sys.argv[1])
checkpoint = Checkpoint(sys.argv[1], config)
headers = max(samples + [anonymous_bytes()]) - before
model = Transformer.from_folder(sys.argv[1], device="cpu")
done.set()
sampler.join()
print(headers, max(samples + [anonymous_bytes()]) - before, checkpoint.nbytes)
"""


def measured(folder: Path) -> list[int]:
    """Bytes of anonymous memory after the headers, and at most; and bytes of the tensors."""
    command = [sys.executable, "-c", PEAK_MEMORY, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number) for number in result.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    config = checkpoints.tiny_config(hidden=2048, ffn_dim=16384, vocab=10000)
    table = checkpoint_table(config)
    zeros = {key: torch.zeros(place.shape, dtype=torch.bfloat16) for key, place in table.items()}
    checkpoints.write_native(tmp_path, config, zeros)
    size = (tmp_path / "consolidated.safetensors").stat().st_size
    headers, peak, nbytes = measured(tmp_path)
    assert 4.5e8 < nbytes <= size
    assert headers < 0.01 * size, "reading the headers takes no memory to speak of"
    assert nbytes <= peak + 2**20 and peak <= 1.15 * size, peak / size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_converting(tmp_path: Path) -> None:
    config = checkpoints.tiny_config(hidden=2048, head_dim=512, ffn_dim=16384, vocab=10000)
    tensors = {}
    for key, place in checkpoint_table(config).items():
        if low_bit_folders.is_quantised(key):
            rows, columns = place.shape
            owner, groups = key.removesuffix("weight"), columns // 128
            tensors[owner + "qweight"] = torch.zeros(columns, rows // 8, dtype=torch.int32)
            tensors[owner + "qzeros"] = torch.zeros(groups, rows // 8, dtype=torch.int32)
            tensors[owner + "scales"] = torch.zeros(groups, rows, dtype=torch.float16)
        else:
            tensors[key] = torch.zeros(place.shape, dtype=torch.float16)
    checkpoints.write_native(tmp_path, config, tensors)
    path = tmp_path / "params.json"
    section = low_bit_folders.AWQ | {"group_size": 128}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": section}))
    size = (tmp_path / "consolidated.safetensors").stat().st_size
    headers, peak, nbytes = measured(tmp_path)
    assert 1.8e8 < nbytes <= size and headers < 0.01 * size
    # Zeros take a byte in memory, half of one in the file.
    assert nbytes <= peak + 2**20 and peak <= 1.15 * size, peak / size
