"""Makes a low-bit checkpoint of another: a Hugging Face folder as compressed-tensors has them.

The matrices of attention and feed-forward get few bits, layer by layer; embeddings, output, norms
and routers stay as they are. A layer becomes one file, and what is done when the work is cut short
is there when it goes on.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral_kernels.model.calibration import CHUNK_TOKENS, Matrices, TextActivations
from mistral_kernels.model.checkpoint_files import read_headers
from mistral_kernels.model.compressed_tensors import (
    quantization_config,
    stored_tensors,
    stored_weight,
)
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.config_writing import huggingface_config
from mistral_kernels.model.error_compensation import Inputs, quantise_compensated
from mistral_kernels.model.hub import resolve_folder
from mistral_kernels.model.layouts import LAYOUTS, Layout
from mistral_kernels.model.new_folder import check_new_folder
from mistral_kernels.model.progress_bar import byte_bar
from mistral_kernels.model.saving import REPLACEABLE, files_beside, token_ids, write_json
from mistral_kernels.model.scale_search import search_scales
from mistral_kernels.model.staged_folder import PLAN, finished_file, staged_folder
from mistral_kernels.model.weight_table import huggingface_table, parameter_shapes
from mistral_kernels.model.weight_views import weight_views
from mistral_kernels.model.weights import Checkpoint
from mistral_kernels.ops.dispatch import KERNEL_DTYPES
from mistral_kernels.ops.low_bit import (
    FP8,
    GROUP_MULTIPLE,
    INT4,
    INT8,
    WORD,
    LowBit,
    round_to_codes,
)

KINDS = {"int4": INT4, "int8": INT8, "fp8": FP8}
GROUP_SIZE = 128  # of int4, where none is asked for
ROUTER = "block_sparse_moe.gate.weight"
HUGGINGFACE = LAYOUTS["huggingface"]


class Quantised(NamedTuple):
    """What `quantise_folder` wrote."""

    folder: Path
    bytes_before: int  # of the tensors
    bytes_after: int


class Work(NamedTuple):
    """What is to be done, checked."""

    checkpoint: Checkpoint
    config: ModelConfig  # in Hugging Face's order of rows
    kind: torch.dtype
    group_size: int | None
    scales: torch.dtype
    device: torch.device
    texts: list[list[int]]  # token ids; none: no calibration

    @property
    def shards(self) -> dict[str, list[str]]:
        """File name to the parameters in it: the ends of the model, then layer by layer."""
        total = self.config.layers + 1
        names = list(parameter_shapes(self.config))
        parts = [[name for name in names if not name.startswith("layers.")]]
        for n in range(self.config.layers):
            parts.append([name for name in names if name.startswith(f"layers.{n}.")])
        return {
            f"{HUGGINGFACE.stem}-{i + 1:05}-of-{total:05}.safetensors": part
            for i, part in enumerate(parts)
        }


def quantise_folder(
    source: str | Path,
    folder: str | Path,
    *,
    format: str,
    group_size: int | None = None,
    calibration: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    layout: Layout | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Quantised:
    """Writes a checkpoint whose matrices have few bits.

    Every group of weights gets the scale whose nearest codes are closest to it. With texts, each
    matrix is rounded for the inputs that they give it (`error_compensation`), behind all that is
    quantised before it.

    Args:
        source: what `Transformer.from_folder` reads, with full weights.
        folder: where; it appears when all is written. Called again after it was killed, with the
            same arguments, this goes on where it was, and writes the same bytes.
        format: "int4", "int8" or "fp8"; the latter two have one scale a row.
        group_size: of int4, columns that share a scale, a multiple of 16; None: 128; 0: all of a
            row.
        calibration: texts of the kind that the model is for; None: none is needed.
        device: where to compute; None: cuda if present, else cpu.
        layout, allow_pickle: as `Transformer.from_folder` takes them.
        overwrite: replace the checkpoint that the folder holds.

    Returns:
        The folder, and the bytes of all tensors before and after.

    Raises:
        ValueError: an argument is out of range; the group size does not divide a matrix, which is
            named; the weights have few bits already, or are not finite; texts hold no token.
        OSError: the source is incomplete or has no tokenizer for the texts; the folder is not
            empty or cannot be written, or the disk is full. Files that are done stay for the next
            call.
    """
    folder = Path(folder)
    kind, group_size = _form(format, group_size)
    ModelConfig.from_folder(source, layout)  # what is not supported is never downloaded
    path = resolve_folder(source, layout=layout)
    checkpoint = Checkpoint(
        path, ModelConfig.from_folder(path, layout), layout, allow_pickle=allow_pickle
    )
    if checkpoint.quantisation is not None:
        raise ValueError(f"{path}: the weights have few bits already ({checkpoint.quantisation})")
    config = replace(checkpoint.config, interleaved=False)
    scales = checkpoint.dtype if checkpoint.dtype in KERNEL_DTYPES else torch.float32
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    texts = [] if calibration is None else _token_ids(calibration, path, checkpoint.config)
    work = Work(checkpoint, config, kind, group_size, scales, device, texts)
    _check_columns(work)
    settings = huggingface_config(config, dtype=checkpoint.dtype) | token_ids(path)
    settings["quantization_config"] = quantization_config(
        kind,
        group_size,
        ordered=bool(texts),
        ignored=[key.removesuffix(".weight") for key in _unquantised(config)],
    )
    target = check_new_folder(folder, overwrite, REPLACEABLE)
    plan = _plan(work, format, calibration)
    try:
        with staged_folder(target, plan, overwrite, REPLACEABLE) as new:
            _write_shards(new, work)
            for file in files_beside(path):
                with finished_file(new / file.name) as part:
                    shutil.copyfile(file, part)
            size = _write_index(new, work)
            with finished_file(new / HUGGINGFACE.config) as part:
                write_json(part, settings)
    except (OSError, SafetensorError) as error:
        kind_of = type(error) if isinstance(error, OSError) else OSError
        raise kind_of(f"{folder}: not quantised ({error})") from error
    return Quantised(target, checkpoint.nbytes, size)


def _form(format: str, group_size: int | None) -> tuple[torch.dtype, int | None]:
    """The kind of codes, and the group size as `LowBit` has it."""
    if format not in KINDS:
        raise ValueError(f"format: expected one of {', '.join(KINDS)}, got {format!r}")
    if format != "int4":
        if group_size:
            raise ValueError(f"group_size: {format} has one scale a row, got {group_size}")
        return KINDS[format], None
    group_size = GROUP_SIZE if group_size is None else group_size
    if group_size < 0 or group_size % GROUP_MULTIPLE:
        raise ValueError(
            f"group_size: expected a multiple of {GROUP_MULTIPLE}, or 0 for all of a row,"
            f" got {group_size}"
        )
    return INT4, group_size or None


def _is_quantised(key: str) -> bool:
    """Whether a tensor of a Hugging Face folder is a matrix of attention or feed-forward."""
    return key.startswith("model.layers.") and not key.endswith(("norm.weight", ROUTER))


def _unquantised(config: ModelConfig) -> list[str]:
    """The linear modules that keep their weights, lm_head also where it is the embedding."""
    keys = huggingface_table(config, stacked=False)
    return [key for key in keys if key.endswith(ROUTER)] + ["lm_head.weight"]


def _check_columns(work: Work) -> None:
    for key, place in huggingface_table(work.config, stacked=False).items():
        if _is_quantised(key) and work.kind == INT4:
            columns, size = place.shape[1], work.group_size or WORD
            if columns % size or columns % WORD:
                raise ValueError(
                    f"{work.checkpoint.folder}: {key}: its {columns} columns are no multiple of"
                    f" {size}" + (", the group size" if work.group_size else "")
                )


def _token_ids(texts: Sequence[str], folder: Path, config: ModelConfig) -> list[list[int]]:
    """The texts, long ones cut, as the model's tokens; each ends with the end of a text."""
    from mistral_kernels.model.tokenizer import Tokenizer  # loads mistral-common

    tokenizer = Tokenizer.from_folder(folder, config)
    tokenizer.check_fits(config)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    found = []
    for text in texts:
        ids = tokenizer.encode(text) + end
        found += [ids[i : i + CHUNK_TOKENS] for i in range(0, len(ids), CHUNK_TOKENS)]
    if not found:
        raise ValueError("calibration: expected texts, got none")
    return found


def _plan(work: Work, format: str, calibration: Sequence[str] | None) -> dict[str, Any]:
    """All that the bytes depend on."""
    from mistral_kernels import __version__

    digest = hashlib.sha256("\0".join(calibration or ()).encode()).hexdigest()
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(work.checkpoint.folder.iterdir())
        if path.is_file()
    }
    return {
        "version": __version__,
        "source": str(work.checkpoint.folder.resolve()),
        "files": files,
        "format": format,
        "group_size": work.group_size,
        "calibration": None if calibration is None else digest,
        "device": work.device.type,
    }


def _write_shards(new: Path, work: Work) -> None:
    """Writes the files that are not there yet, one after another."""
    shards = list(work.shards.items())
    shapes, width = parameter_shapes(work.config), work.checkpoint.dtype.itemsize
    sizes = [sum(math.prod(shapes[name]) for name in names) * width for _, names in shards]
    activations = _activations(work) if work.texts else None
    with byte_bar("quantising") as progress:
        bar = progress.add_task("", total=sum(sizes))
        for n, (file_name, names) in enumerate(shards):
            path, layer = new / file_name, n - 1
            if not path.exists():
                tensors = _shard(work, layer, names, activations, path)
                with finished_file(path) as part:
                    save_file(tensors, part, metadata={"format": "pt"})
                    # safetensors lets nobody but the owner read its files.
                    part.chmod((new / PLAN).stat().st_mode)
            elif activations and layer >= 0:
                _shard(work, layer, names, activations, path)
            progress.advance(bar, sizes[n])


def _activations(work: Work) -> TextActivations:
    name = "tok_embeddings"
    embedding = work.checkpoint.read([name])[name]
    return TextActivations(work.config, work.texts, embedding, work.device)


def _shard(
    work: Work, layer: int, names: list[str], activations: TextActivations | None, done: Path
) -> dict[str, Tensor]:
    """The tensors of a file: those of a layer, or with layer -1 of the ends of the model.

    Where an earlier attempt has finished the file `done`, only the texts pass the layer.
    """
    parameters = work.checkpoint.read(names)
    views = weight_views(parameters, work.checkpoint.config, "huggingface")
    stored = load_file(done) if done.exists() else {}
    found = {key: view.read() for key, view in views.items() if not _is_quantised(key)}

    def full(name: str) -> Tensor:
        return views[_key(layer, name)].read().to(work.device, torch.float32)

    def quantise(name: str, inputs: Inputs | None = None) -> Tensor:
        key, weight = _key(layer, name), full(name)
        if not weight.isfinite().all():
            raise ValueError(f"{work.checkpoint.folder}: {key}: holds values that are not finite")
        if stored:
            codes, scales, *_ = stored_weight(key, stored)
            low_bit = LowBit(codes.to(work.device), scales.to(work.device))
        elif inputs is None:
            scales = search_scales(weight, work.kind, work.group_size, work.scales)
            low_bit = round_to_codes(weight, scales, None, work.kind)
        else:
            low_bit = quantise_compensated(weight, work.kind, work.group_size, work.scales, inputs)
        found.update(stored_tensors(key, LowBit(low_bit.qweight.cpu(), low_bit.scales.cpu())))
        return low_bit.dequantise(torch.float32)

    if layer >= 0 and activations:
        activations.pass_layer(layer, _within(layer, found), Matrices(full, quantise))
    else:
        for key in views:
            if _is_quantised(key):
                quantise(key.removeprefix(_key(layer, "")))
    return found


def _key(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


def _within(layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name within the layer -> tensor, of those that are not quantised."""
    return {
        key.removeprefix(_key(layer, "")): tensor
        for key, tensor in tensors.items()
        if key.endswith(("norm.weight", ROUTER))
    }


def _write_index(new: Path, work: Work) -> int:
    """Writes the list of the tensors in all files; returns their bytes."""
    stored = read_headers([new / name for name in work.shards])
    size = sum(tensor.nbytes for tensor in stored.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {key: tensor.path.name for key, tensor in stored.items()},
    }
    with finished_file(new / HUGGINGFACE.index) as part:
        write_json(part, index)
    return size
