"""What model `mistral-kernels bench` measures: options and files checked, then the model made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mistral_kernels.bench_options import BenchOptions, Weights
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.hub import resolve_folder
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.random_weights import (
    FORMATS,
    in_few_bits,
    low_bit_forms,
    random_model,
)
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.model.weights import Checkpoint
from mistral_kernels.options import torch_dtype

Forms = Mapping[str, LowBitForm]


class Subject(NamedTuple):
    """The model to measure, known before a weight is read."""

    folder: Path | None  # None: random weights
    config: ModelConfig
    of_layers: int  # that the published model has
    dtype: torch.dtype
    stored: Forms  # of the folder's weights that are in few bits
    rounded: str | None  # of FORMATS, what full projections become
    low_bit: Forms  # of the weights that are measured

    def made(self, *, backend: str, device: torch.device) -> Transformer:
        """The model, its weights in memory."""
        how = {"device": device, "dtype": self.dtype, "backend": backend}
        if self.folder is None:
            torch.manual_seed(0)
            return random_model(self.config, weights=self.rounded, **how)
        full = Transformer.from_folder(self.folder, **how)
        return in_few_bits(full, self.rounded, backend=backend) if self.rounded else full


def subject_of(folder: str | None, options: BenchOptions) -> Subject:
    """What the options of `bench` mean.

    Raises:
        ValueError: they contradict each other, the model or its files.
        OSError: there is no such folder.
    """
    dtype = torch_dtype(options.dtype)
    if options.weights == Weights.bf16:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"--weights bf16: full weights are held in --dtype, got {options.dtype}"
            )
        dtype = torch.bfloat16
    if options.model is not None:
        return _published(folder, options, dtype or torch.bfloat16)
    for option, value in (
        ("--random-weights", options.random_weights),
        ("--layers", options.layers),
    ):
        if value:
            raise ValueError(f"{option} needs --model NAME, whose shape it is about")
    return _stored(resolve_folder(TINY_MIXTRAL if folder is None else folder), options, dtype)


def _published(folder: str | None, options: BenchOptions, dtype: torch.dtype) -> Subject:
    """The shape of a published model, with random weights."""
    if folder is not None:
        raise ValueError(f"--model {options.model} and FOLDER {folder} exclude each other")
    if not options.random_weights:
        raise ValueError(
            f"--model {options.model} gives a shape without weights: add --random-weights,"
            " or name a FOLDER"
        )
    try:
        whole = ModelConfig.known(options.model)
    except ValueError as error:
        raise ValueError(f"--model: {str(error).removeprefix('known: ')}") from error
    config = first_layers(whole, options.layers or whole.layers, options.model)
    rounded, forms = _rounded(config, options.weights, dtype)
    return Subject(None, config, whole.layers, dtype, {}, rounded, forms)


def _stored(folder: Path, options: BenchOptions, dtype: torch.dtype | None) -> Subject:
    """A checkpoint, of which only the headers are read."""
    checkpoint = Checkpoint(folder, ModelConfig.from_folder(folder))
    config, kinds = checkpoint.config, weight_kinds(checkpoint.forms)
    dtype = dtype or checkpoint.dtype
    if not kinds:
        rounded, forms = _rounded(config, options.weights, dtype)
        return Subject(folder, config, config.layers, dtype, {}, rounded, forms)
    if options.weights and kinds != [options.weights]:
        raise ValueError(
            f"--weights {options.weights}: those of {folder} are {' and '.join(kinds)} already"
        )
    return Subject(folder, config, config.layers, dtype, checkpoint.forms, None, checkpoint.forms)


def _rounded(
    config: ModelConfig, weights: Weights | None, dtype: torch.dtype
) -> tuple[str | None, Forms]:
    """Of full weights: the name in FORMATS and the forms that they get, if any."""
    if weights not in FORMATS:
        return None, {}
    try:
        return str(weights), low_bit_forms(config, weights, dtype)
    except ValueError as error:
        raise ValueError(f"--weights {error}") from error


def first_layers(config: ModelConfig, layers: int, name: str) -> ModelConfig:
    """A model of the first layers of another, each with its window."""
    if layers > config.layers:
        raise ValueError(f"--layers: expected at most the {config.layers} of {name}, got {layers}")
    return replace(config, layers=layers, windows=config.windows[:layers])


def weight_kinds(forms: Forms) -> list[str]:
    """The names in FORMATS of the codes that weights are in, sorted."""
    codes = {form.codes for form in forms.values()}
    return sorted(name for name, (kind, _) in FORMATS.items() if kind in codes)
