"""Checkpoint files: what they must hold, and the way of every tensor into the model.

A checkpoint is checked from the headers of its files alone, before any memory is taken; then each
tensor goes from the mapped file straight to its place in the model.
"""

import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistral_kernels.model.config import Layout, ModelConfig
from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.weight_table import (
    Place,
    checkpoint_table,
    huggingface_table,
    parameter_shapes,
)

logger = logging.getLogger("mistral_kernels")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# Tensors that a text model has no use for: rope frequencies are computed, and these prefixes are
# the vision parts of multimodal checkpoints.
UNUSED = re.compile(
    r".*rotary_emb\.inv_freq"
    r"|(model\.)?(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm"
    r"|vision_tower|multi_modal_projector)\..*"
)


class Stored(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Maps a safetensors file; its tensors are views of the mapping and take no memory.

    Args:
        path: the file.

    Yields:
        The open file; its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error
    with file:
        yield file


def read_headers(paths: list[Path]) -> dict[str, Stored]:
    """What the headers of some files say of their tensors, in the order of the files' bytes.

    Args:
        paths: safetensors files.

    Returns:
        Key to description.

    Raises:
        FileNotFoundError, ValueError: as `open_safetensors`; or two files hold the same key.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        with open_safetensors(path) as file:
            for key in file.offset_keys():
                if key in found:
                    raise ValueError(f"{path}: {key}: also in {found[key].path.name}")
                header = file.get_slice(key)
                found[key] = Stored(path, key, tuple(header.get_shape()), header.get_dtype())
    return found


def check_dtype(stored: Stored) -> None:
    """Raises a ValueError, naming file and key, unless the tensor's dtype can be read."""
    if stored.dtype not in DTYPES:
        reason = "not supported yet" if stored.dtype.startswith("F8") else "not supported"
        raise ValueError(f"{stored.path}: {stored.key}: dtype {stored.dtype} is {reason}")


def check_shape(stored: Stored, expected: tuple[int, ...]) -> None:
    """Raises a ValueError, naming file and key, unless the tensor has the shape expected."""
    if stored.shape != expected:
        raise ValueError(
            f"{stored.path}: {stored.key}: expected shape {expected}, got {stored.shape}"
        )


def check_parameters(parameters: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raises a ValueError unless these are the model's parameters, and not on the meta device."""
    shapes = parameter_shapes(config)
    for name in sorted(shapes.keys() ^ parameters.keys()):
        state = "missing" if name in shapes else "not a parameter of this model"
        raise ValueError(f"parameters: {name}: {state}")
    for name, shape in shapes.items():
        parameter = parameters[name]
        if tuple(parameter.shape) != shape:
            got = tuple(parameter.shape)
            raise ValueError(f"parameters: {name}: expected shape {shape}, got {got}")
        if parameter.is_meta:
            raise ValueError(f"parameters: {name}: expected memory, got a meta tensor")


class Checkpoint:
    """A checkpoint folder whose files fit the model, checked from their headers alone.

    Args:
        folder: path of the checkpoint.
        config: the model, as read from that folder.
        layout: "native" or "huggingface"; None = the one that `config` was read from.

    Attributes:
        dtype: the dtype that most of the weights' bytes have (norms are sometimes wider).
        nbytes: bytes of the tensors that the model takes.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder or a file that it must hold is absent.
        ValueError: a file is malformed, or a tensor is missing, unknown, misshapen or of a dtype
            that is not supported; file and key are named.
    """

    def __init__(self, folder: str | Path, config: ModelConfig, layout: Layout | None = None):
        self.folder, self.config = Path(folder), config
        rope_layout = "native" if config.interleaved else "huggingface"
        if (layout or rope_layout) != rope_layout:
            raise ValueError(f"layout: expected {rope_layout!r} as in config, got {layout!r}")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder}: expected a checkpoint folder")
        find = _native_files if config.interleaved else _huggingface_files
        files = find(self.folder)
        stored = read_headers(files)
        unused = [key for key in stored if UNUSED.fullmatch(key)]
        for key in unused:
            del stored[key]
        if unused:
            skipped = "%s: skipped %d tensors that a text model does not use, such as %s"
            logger.info(skipped, self.folder, len(unused), unused[0])
        source = files[0] if len(files) == 1 else self.folder
        self._tensors = _assign(source, stored, config)
        sizes: Counter[torch.dtype] = Counter()
        for tensor, _ in self._tensors:
            dtype = DTYPES[tensor.dtype]
            sizes[dtype] += math.prod(tensor.shape) * dtype.itemsize
        self.dtype: torch.dtype = max(sizes, key=sizes.__getitem__)
        self.nbytes: int = sizes.total()

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies every tensor to its place, with a progress bar if stderr is a terminal.

        Args:
            parameters: name to tensor, as `parameter_shapes(config)` has them; any floating dtype
                and device, each value is converted on its way.

        Raises:
            ValueError: the parameters are not those of the model; nothing was written.
        """
        check_parameters(parameters, self.config)
        columns = ("loading", BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console, quiet = Console(stderr=True), not (sys.stderr and sys.stderr.isatty())
        with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
            bar = progress.add_task("", total=self.nbytes)
            for path, tensors in groupby(self._tensors, key=lambda pair: pair[0].path):
                with open_safetensors(path) as file:
                    for stored, place in tensors:
                        tensor = file.get_tensor(stored.key)
                        parameters[place.parameter][place.index].copy_(tensor)
                        progress.advance(bar, tensor.nbytes)


def _native_files(folder: Path) -> list[Path]:
    single = folder / "consolidated.safetensors"
    shards = sorted(folder.glob("consolidated-*-of-*.safetensors"))
    return [single] if single.exists() else shards or _no_files(folder, "consolidated*.safetensors")


def _huggingface_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        return _no_files(folder, "model.safetensors or its index")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: expected an object, got {weight_map!r:.80}")
    for key, name in weight_map.items():
        # A plain name cannot lead out of the folder; links are followed, as hub caches use them.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{index}: {key}: expected the name of a .safetensors file in the folder, "
                f"got {name!r:.80}"
            )
    return [folder / name for name in sorted(set(weight_map.values()))]


def _no_files(folder: Path, wanted: str) -> list[Path]:
    """Raises the error for a folder with no safetensors file of its layout."""
    for pattern in ("*.pth", "*.pt", "*.bin"):
        for pickle in sorted(folder.glob(pattern)):
            raise ValueError(
                f"{folder}: holds {pickle.name} and no {wanted}; pickles are not read, "
                "convert them to safetensors"
            )
    raise FileNotFoundError(f"{folder}: holds no {wanted}")


def _assign(
    source: Path, stored: dict[str, Stored], config: ModelConfig
) -> list[tuple[Stored, Place]]:
    """Pairs every tensor with its place; what is missing, unknown or misshapen is refused."""
    if config.interleaved:
        table = checkpoint_table(config)
        embedding, output = "tok_embeddings.weight", "output.weight"
    else:
        stacked = any(key.endswith("mlp.experts.gate_up_proj") for key in stored)
        table = huggingface_table(config, stacked=stacked)
        embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    # First of all: scales beside low-bit weights would otherwise be reported as unknown tensors.
    for tensor in stored.values():
        check_dtype(tensor)
    pairs: dict[str, tuple[Stored, Place]] = {}
    tied = None
    for tensor in stored.values():
        # Multimodal checkpoints name their text part `language_model.model.` or, as transformers 5
        # holds it in memory, `model.language_model.`.
        key = re.sub(r"^language_model\.|(?<=^model\.)language_model\.", "", tensor.key)
        if key in pairs:
            raise ValueError(f"{tensor.path}: {tensor.key}: stored twice")
        if config.tied_embeddings and key == output:
            tied = tensor
        elif key not in table:
            raise ValueError(f"{tensor.path}: {tensor.key}: not a tensor of this model")
        else:
            check_shape(tensor, table[key].shape)
            pairs[key] = tensor, table[key]
    missing = [key for key in table if key not in pairs]
    if missing:
        others = f", and so are {len(missing) - 1} others" if missing[1:] else ""
        raise ValueError(f"{source}: {missing[0]}: missing{others}")
    if tied and not _same_values(tied, pairs[embedding][0]):
        raise ValueError(
            f"{tied.path}: {tied.key}: differs from {embedding}, to which the config ties it"
        )
    return list(pairs.values())


def _same_values(left: Stored, right: Stored) -> bool:
    """Whether two tensors are equal bit for bit; both stay in their mapped files."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    with open_safetensors(left.path) as left_file, open_safetensors(right.path) as right_file:
        return torch.equal(left_file.get_tensor(left.key), right_file.get_tensor(right.key))
