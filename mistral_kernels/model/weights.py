"""Checkpoint files: what they must hold, and the way of every tensor into the model.

A checkpoint is checked from the headers of its files alone, before any memory is taken; then each
tensor goes from the mapped file straight to its place in the model.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from mistral_kernels.model import fp8
from mistral_kernels.model.byte_bar import byte_bar
from mistral_kernels.model.checkpoint_files import (
    DTYPES,
    Stored,
    huggingface_files,
    native_files,
    open_tensors,
    read_headers,
    read_into,
)
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.config_formats import ties_unless_stored
from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.layouts import CONFIG_FILES, Layout
from mistral_kernels.model.page_advice import Advice, advise
from mistral_kernels.model.weight_table import (
    Place,
    checkpoint_table,
    first_mixtral_table,
    huggingface_table,
    parameter_shapes,
)

logger = logging.getLogger("mistral_kernels")

# Tensors that a text model has no use for: rope frequencies are computed, and these prefixes are
# the vision parts of multimodal checkpoints.
UNUSED = re.compile(
    r".*rotary_emb\.inv_freq"
    r"|(model\.)?(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm"
    r"|vision_tower|multi_modal_projector)\..*"
)


def check_dtype(stored: Stored) -> None:
    """Raises a ValueError, naming file and key, unless the tensor's dtype can be read."""
    if stored.dtype not in DTYPES:
        raise ValueError(f"{stored.path}: {stored.key}: dtype {stored.dtype} is not supported")


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
        allow_pickle: whether `consolidated.NN.pth` and `pytorch_model*.bin` may be read.

    Attributes:
        config: the model; its embeddings are tied if the files say so and the config says nothing.
        dtype: the dtype that most of the weights' bytes have (norms are sometimes wider); of those
            that are not in 8 bits, as these are widened to it.
        nbytes: bytes in the files of the tensors that the model takes.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder or a file that it must hold is absent.
        ValueError: a file is malformed, or a pickle and not allowed, or a tensor is missing,
            unknown, misshapen or of a dtype that is not supported; file and key are named.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ModelConfig,
        layout: Layout | None = None,
        *,
        allow_pickle: bool = False,
    ):
        self.folder = Path(folder)
        rope_layout = "native" if config.interleaved else "huggingface"
        if (layout or rope_layout) != rope_layout:
            raise ValueError(f"layout: expected {rope_layout!r} as in config, got {layout!r}")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder}: expected a checkpoint folder")
        find = native_files if config.interleaved else huggingface_files
        files = find(self.folder, allow_pickle)
        stored = read_headers(files)
        self._drop(stored, UNUSED, "that a text model does not use")
        self._drop(stored, fp8.ACTIVATION_SCALE, "that scale activations in 8 bits")
        self._scales = _take_scales(stored)
        self.config = _resolve_ties(self.folder, stored, config)
        source = files[0] if len(files) == 1 else self.folder
        self._tensors = _assign(source, stored, self.config, self._scales)
        sizes: Counter[str] = Counter()
        for tensor, _ in self._tensors:
            sizes[tensor.dtype] += tensor.nbytes
        self.nbytes: int = sizes.total()
        del sizes[fp8.DTYPE]
        self.dtype: torch.dtype = DTYPES[max(sizes, key=sizes.__getitem__)]

    @property
    def is_low_bit(self) -> bool:
        """Whether there are weights in few bits."""
        return bool(self._scales)

    def _drop(self, stored: dict[str, Stored], pattern: re.Pattern[str], reason: str) -> None:
        """Takes keys out of `stored`, with one line about them."""
        keys = [key for key in stored if pattern.fullmatch(key)]
        for key in keys:
            del stored[key]
        if keys:
            skipped = "%s: skipped %d tensors %s, such as %s"
            logger.info(skipped, self.folder, len(keys), reason, keys[0])

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
        for parameter in parameters.values():
            advise(parameter, Advice.HUGE_PAGES)
        with byte_bar("loading") as progress:
            bar = progress.add_task("", total=self.nbytes)
            for nbytes in self._copy(self._tensors, parameters):
                progress.advance(bar, nbytes)

    @torch.no_grad()
    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Reads some of the model's parameters.

        Args:
            names: of `parameter_shapes(config)`.

        Returns:
            Name to tensor, of dtype `dtype` on the CPU.
        """
        shapes = parameter_shapes(self.config)
        found = {name: torch.empty(shapes[name], dtype=self.dtype, device="cpu") for name in names}
        wanted = [pair for pair in self._tensors if pair[1].parameter in found]
        for _ in self._copy(wanted, found):
            pass
        return found

    def _copy(
        self, tensors: list[tuple[Stored, Place]], parameters: Mapping[str, Tensor]
    ) -> Iterator[int]:
        """Copies these tensors to their places; yields the bytes of each."""
        scales = self._read_scales()
        for path, of_file in groupby(tensors, key=lambda pair: pair[0].path):
            with open_tensors(path) as read:
                for stored, place in of_file:
                    target = place.of(parameters)
                    if not read_into(target, stored):
                        _convert(target, read(stored.key), scales.get(stored.key))
                    yield stored.nbytes

    def _read_scales(self) -> dict[str, Tensor]:
        """The scales of all weights in 8 bits, which may lie in other files than their weights."""
        scales = {}
        by_path = sorted(self._scales.items(), key=lambda pair: pair[1].path)
        for path, pairs in groupby(by_path, key=lambda pair: pair[1].path):
            with open_tensors(path) as read:
                # Cloned: views would keep every file mapped.
                scales |= {key: read(scale.key).clone() for key, scale in pairs}
        return scales


def _convert(target: Tensor, tensor: Tensor, scale: Tensor | None) -> None:
    """Copies a mapped tensor to memory of another dtype, order or device; 8 bits have a scale."""
    advise(tensor, Advice.READ_AHEAD)
    if scale is None:
        target.copy_(tensor.view(target.shape))
    else:
        fp8.dequantise_(target, tensor, scale)


def _take_scales(stored: dict[str, Stored]) -> dict[str, Stored]:
    """Takes the scales of weights in 8 bits out of `stored`; key of the weight to scale."""
    scales = {}
    for key, scale in list(stored.items()):
        if match := fp8.WEIGHT_SCALE.fullmatch(key):
            weight = stored.get(f"{match[1]}weight")
            if weight is None or weight.dtype != fp8.DTYPE:
                raise ValueError(f"{scale.path}: {key}: scales no weight of dtype {fp8.DTYPE}")
            check_dtype(scale)
            if fp8.scale_grid(scale.shape, weight.shape) is None:
                raise ValueError(
                    f"{scale.path}: {key}: expected one scale, or one for each row or block of"
                    f" {weight.shape}, got shape {scale.shape}"
                )
            scales[weight.key] = stored.pop(key)
    return scales


def _resolve_ties(folder: Path, stored: dict[str, Stored], config: ModelConfig) -> ModelConfig:
    """The config, with tied embeddings where it leaves that to the files and they hold no output.

    transformers ties such a model; with an output in the files it does not.
    """
    path = folder / CONFIG_FILES["huggingface"]
    if config.interleaved or config.tied_embeddings or not path.exists():
        return config
    has_output = any(key.endswith("lm_head.weight") for key in stored)
    silent = not has_output and ties_unless_stored(read_json(path))
    return replace(config, tied_embeddings=True) if silent else config


def _expected(stored: dict[str, Stored], config: ModelConfig) -> tuple[dict[str, Place], str, str]:
    """The table that these files follow, and its keys of embedding and output."""
    if not config.interleaved:
        stacked = any(key.endswith("mlp.experts.gate_up_proj") for key in stored)
        table = huggingface_table(config, stacked=stacked)
        return table, "model.embed_tokens.weight", "lm_head.weight"
    first_release = any(key.endswith(".block_sparse_moe.w1") for key in stored)
    table = first_mixtral_table(config) if first_release else checkpoint_table(config)
    return table, "tok_embeddings.weight", "output.weight"


def _assign(
    source: Path, stored: dict[str, Stored], config: ModelConfig, scales: dict[str, Stored]
) -> list[tuple[Stored, Place]]:
    """Pairs every tensor with its place; what is missing, unknown or misshapen is refused."""
    table, embedding, output = _expected(stored, config)
    pairs: dict[str, tuple[Stored, Place]] = {}
    tied = None
    for tensor in stored.values():
        # Multimodal checkpoints name their text part `language_model.model.` or, as transformers 5
        # holds it in memory, `model.language_model.`.
        key = re.sub(r"^language_model\.|(?<=^model\.)language_model\.", "", tensor.key)
        if key in pairs:
            raise ValueError(f"{tensor.path}: {tensor.key}: stored twice")
        if tensor.key not in scales:
            if tensor.dtype == fp8.DTYPE:
                raise ValueError(
                    f"{tensor.path}: {tensor.key}: dtype {tensor.dtype} without a scale"
                )
            check_dtype(tensor)
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
    with open_tensors(left.path) as read_left, open_tensors(right.path) as read_right:
        return torch.equal(read_left(left.key), read_right(right.key))
