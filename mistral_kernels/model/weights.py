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

from mistral_kernels.model.checkpoint_files import (
    DTYPES,
    Stored,
    check_dtype,
    check_shape,
    huggingface_files,
    native_files,
    open_at_need,
    open_tensors,
    read_headers,
    read_into,
)
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.config_formats import ties_unless_stored
from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.layouts import CONFIG_FILES, Layout
from mistral_kernels.model.low_bit_files import NAMES
from mistral_kernels.model.low_bit_joined import joined_forms
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.page_advice import Advice, advise
from mistral_kernels.model.progress_bar import byte_bar
from mistral_kernels.model.quantisation import Quantisation, find_quantisation
from mistral_kernels.model.stored_low_bit import StoredLowBit, take_low_bit
from mistral_kernels.model.weight_table import (
    Place,
    checkpoint_table,
    first_mixtral_table,
    huggingface_table,
    parameter_shapes,
)
from mistral_kernels.ops.low_bit import LowBit

logger = logging.getLogger("mistral_kernels")

# Tensors that a text model has no use for: rope frequencies are computed, and these prefixes are
# the vision parts of multimodal checkpoints.
UNUSED = re.compile(
    r".*rotary_emb\.inv_freq"
    r"|(model\.)?(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm"
    r"|vision_tower|multi_modal_projector)\..*"
)

# Scales of what is not quantised here: activations, and keys and values of the cache.
UNUSED_SCALES = re.compile(
    r".+\.(qscale_act|activation_scale|(input|output)_(scale|zero_point)|(k|v|kv)_(scale|zero_point))"
)


def check_parameters(parameters: Mapping[str, Tensor | LowBit], config: ModelConfig) -> None:
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
        if _memory(parameter)[0].is_meta:
            raise ValueError(f"parameters: {name}: expected memory, got a meta tensor")


def _memory(parameter: Tensor | LowBit) -> list[Tensor]:
    """The tensors of a weight."""
    held = parameter if isinstance(parameter, LowBit) else (parameter,)
    return [tensor for tensor in held if tensor is not None]


class Checkpoint:
    """A checkpoint folder whose files fit the model, checked from their headers alone.

    Of low-bit weights with act-order the order is read as well.

    Args:
        folder: path of the checkpoint.
        config: the model, as read from that folder.
        layout: "native" or "huggingface"; None = the one that `config` was read from.
        allow_pickle: whether `consolidated.NN.pth` and `pytorch_model*.bin` may be read.
        dequantise: no weight is to stay in few bits.

    Attributes:
        config: the model; its embeddings are tied if the files say so and the config says nothing.
        dtype: the dtype that most of the weights' bytes have (norms are sometimes wider), of those
            that are not in few bits.
        nbytes: bytes in the files of the tensors that the model takes.
        quantisation: how weights are stored in few bits; None: none is.
        forms: name to form of the parameters that stay in few bits.

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
        dequantise: bool = False,
    ):
        self.folder = Path(folder)
        rope_layout = _layout(config)
        if (layout or rope_layout) != rope_layout:
            raise ValueError(f"layout: expected {rope_layout!r} as in config, got {layout!r}")
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder}: expected a checkpoint folder")
        find = native_files if config.interleaved else huggingface_files
        files = find(self.folder, allow_pickle)
        stored = read_headers(files)
        self._drop(stored, UNUSED, "that a text model does not use")
        self._drop(stored, UNUSED_SCALES, "that scale what is not quantised here")
        self.config = _resolve_ties(self.folder, stored, config)
        source = files[0] if len(files) == 1 else self.folder
        described = self.folder / CONFIG_FILES[rope_layout]
        self.quantisation = _quantisation(described)
        self._tensors = _assign(source, stored, self.config, self.quantisation)
        if self.quantisation and not any(isinstance(s, StoredLowBit) for s, _ in self._tensors):
            raise ValueError(f"{described}: says {self.quantisation}, but no weight is quantised")
        self.forms: dict[str, LowBitForm] = {}
        if self.quantisation:
            self.forms = self._forms(dequantise)
        sizes: Counter[str] = Counter()
        for tensor, _ in self._tensors:
            if isinstance(tensor, Stored):
                sizes[tensor.dtype] += tensor.nbytes
        self.nbytes: int = sum(tensor.nbytes for tensor, _ in self._tensors)
        self.dtype: torch.dtype = DTYPES[max(sizes, key=sizes.__getitem__)]

    def _forms(self, dequantise: bool) -> dict[str, LowBitForm]:
        """The forms of what stays in few bits, with a line on what was found."""
        note = self.quantisation.note
        aside = f"; {note} are not quantised here" if note else ""
        if dequantise:
            logger.info("%s: %s, widened%s", self.folder, self.quantisation, aside)
            return {}
        logger.info("%s: %s%s", self.folder, self.quantisation, aside)
        forms, widened = joined_forms(self._tensors, parameter_shapes(self.config))
        if widened:
            name, reason = next(iter(widened.items()))
            text = "%s: widened %d weights, such as %s: %s"
            logger.info(text, self.folder, len(widened), name, reason)
        return forms

    def _drop(self, stored: dict[str, Stored], pattern: re.Pattern[str], reason: str) -> None:
        """Takes keys out of `stored`, with one line about them."""
        keys = [key for key in stored if pattern.fullmatch(key)]
        for key in keys:
            del stored[key]
        if keys:
            skipped = "%s: skipped %d tensors %s, such as %s"
            logger.info(skipped, self.folder, len(keys), reason, keys[0])

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor | LowBit]) -> None:
        """Copies every tensor to its place, with a progress bar if stderr is a terminal.

        Args:
            parameters: name to weight, as `parameter_shapes(config)` has them, on any device: a
                tensor of any floating dtype, to which each value is converted on its way, or of
                those in `forms` a weight of that form.

        Raises:
            ValueError: the parameters are not those of the model, then nothing was written; or a
                scale of low-bit weights is not finite.
        """
        check_parameters(parameters, self.config)
        for parameter in parameters.values():
            for tensor in _memory(parameter):
                advise(tensor, Advice.HUGE_PAGES)
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
            Name to tensor, of dtype `dtype` on the CPU; what is in few bits is widened.
        """
        shapes = parameter_shapes(self.config)
        found = {name: torch.empty(shapes[name], dtype=self.dtype, device="cpu") for name in names}
        wanted = [pair for pair in self._tensors if pair[1].parameter in found]
        for _ in self._copy(wanted, found):
            pass
        return found

    def _copy(
        self,
        tensors: list[tuple[Stored | StoredLowBit, Place]],
        parameters: Mapping[str, Tensor | LowBit],
    ) -> Iterator[int]:
        """Copies these tensors to their places; yields the bytes of each."""
        for path, of_file in groupby(tensors, key=lambda pair: pair[0].path):
            with open_tensors(path) as read:
                for stored, place in of_file:
                    target = place.of(parameters)
                    if isinstance(stored, StoredLowBit):
                        stored.copy_to(target, read)
                    elif not read_into(target, stored):
                        tensor = read(stored.key)
                        advise(tensor, Advice.READ_AHEAD)
                        target.copy_(tensor.view(target.shape))
                    yield stored.nbytes


def _quantisation(path: Path) -> Quantisation | None:
    """What a configuration file, if there is one, says of quantised weights."""
    if not path.exists():
        return None
    try:
        return find_quantisation(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _layout(config: ModelConfig) -> Layout:
    """The layout that a configuration was read from."""
    return "native" if config.interleaved else "huggingface"


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
    source: Path, stored: dict[str, Stored], config: ModelConfig, quantisation: Quantisation | None
) -> list[tuple[Stored | StoredLowBit, Place]]:
    """Pairs every tensor with its place; what is missing, unknown or misshapen is refused."""
    table, embedding, output = _expected(stored, config)
    found = _by_key(stored)
    pairs: dict[str, tuple[Stored | StoredLowBit, Place]] = {}
    if quantisation:
        with open_at_need() as read:
            for key, place in table.items():
                if low_bit := take_low_bit(found, key, place.shape, quantisation, read):
                    pairs[key] = low_bit, place
    full = {key: found.pop(key) for key in table if key in found and key not in pairs}
    tied = found.pop(output, None) if config.tied_embeddings else None
    for key, tensor in found.items():
        what = "not a tensor of this model"
        if key in pairs or key.rpartition(".")[2] in NAMES:
            stored_as = quantisation or "plain weights"
            what = f"not a tensor of {stored_as}, as {CONFIG_FILES[_layout(config)]} describes them"
        raise ValueError(f"{tensor.path}: {tensor.key}: {what}")
    for key, tensor in full.items():
        check_dtype(tensor)
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
    # In the order of the files' bytes, so that each file is opened once and read forward.
    return sorted(pairs.values(), key=lambda pair: (pair[0].path, pair[0].offset or 0))


def _by_key(stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors by their keys in a text model.

    Multimodal checkpoints name their text part `language_model.model.` or, as transformers 5 holds
    it in memory, `model.language_model.`.
    """
    found: dict[str, Stored] = {}
    for tensor in stored.values():
        key = re.sub(r"^language_model\.|(?<=^model\.)language_model\.", "", tensor.key)
        if key in found:
            raise ValueError(f"{tensor.path}: {tensor.key}: stored twice")
        found[key] = tensor
    return found


def _same_values(left: Stored, right: Stored) -> bool:
    """Whether two tensors are equal bit for bit; both stay in their mapped files."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    with open_tensors(left.path) as read_left, open_tensors(right.path) as read_right:
        return torch.equal(read_left(left.key), read_right(right.key))
