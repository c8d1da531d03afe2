"""Writes tiny checkpoints in the forms that releases had besides plain safetensors.

Pickles (7B v0.1's tar, `pytorch_model.bin`), the first release of Mixtral, and weights in 8 bits.
"""

import json
from pathlib import Path

import torch
from checkpoints import huggingface_config, native_params
from torch import Tensor

from mistral_kernels.model.config import ModelConfig

FP8 = torch.float8_e4m3fn


def write_pickles(
    folder: Path, config: ModelConfig, tensors: dict[str, Tensor], *, files: int = 1
) -> None:
    """Writes native tensors as `consolidated.00.pth` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(native_params(config)))
    for n in range(files):
        torch.save(dict(list(tensors.items())[n::files]), folder / f"consolidated.{n:02}.pth")


def write_bins(
    folder: Path, config: ModelConfig, tensors: dict[str, Tensor], *, files: int = 1
) -> None:
    """Writes Hugging Face tensors as `pytorch_model.bin`, or as several and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(huggingface_config(config)))
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for n in range(files):
        part = dict(list(tensors.items())[n::files])
        name = f"pytorch_model-{n + 1:05}-of-{files:05}.bin"
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def first_mixtral_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Native tensors as the first release names and stacks them; w2 is transposed there."""
    released = {}
    for key, tensor in tensors.items():
        if ".experts." not in key:
            released[key.replace("feed_forward.gate", "block_sparse_moe.gate")] = tensor
    for n in range(config.layers):
        experts = [f"layers.{n}.feed_forward.experts.{e}" for e in range(config.experts)]
        for name in ("w1", "w2", "w3"):
            parts = [tensors[f"{expert}.{name}.weight"] for expert in experts]
            parts = [part.T for part in parts] if name == "w2" else parts
            released[f"layers.{n}.block_sparse_moe.{name}"] = torch.cat(parts)
    return released


def quantise(weight: Tensor, grid: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits and its scales: one, one a row (rows,), or a grid of blocks."""
    rows, columns = weight.shape
    row_blocks, column_blocks = (*grid, 1, 1)[:2]
    blocks = weight.float().view(row_blocks, rows // row_blocks, column_blocks, -1)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    stored = (blocks / scale).view(rows, columns).to(FP8)
    return stored, scale.reshape(grid)


def widened(stored: Tensor, scale: Tensor) -> Tensor:
    """What `quantise` gave, in float64, element by element."""
    rows, columns = stored.shape
    row_blocks, column_blocks = (*scale.shape, 1, 1)[:2]
    grid = scale.double().reshape(row_blocks, column_blocks)
    wide = stored.double()
    for i in range(rows):
        for j in range(columns):
            wide[i, j] *= grid[i * row_blocks // rows, j * column_blocks // columns]
    return wide
