"""What `mistral-kernels bench` does: makes or loads a model, measures it and its machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from mistral_kernels.bench_options import BenchOptions, Weights
from mistral_kernels.checkpoint_info import cache_bytes, part_sizes, working_bytes
from mistral_kernels.environment import environment
from mistral_kernels.free_memory import free_memory
from mistral_kernels.machine_limits import MATMUL, STREAM_BYTES, Limits, machine_limits
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.backends import choose_backends
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.families import family_of
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
from mistral_kernels.model_speed import Load, measure_speed, steps_of
from mistral_kernels.options import torch_device, torch_dtype
from mistral_kernels.tables import byte_size


class Subject(NamedTuple):
    """The model to measure, known before a weight is read."""

    folder: Path | None  # None: random weights
    config: ModelConfig
    published_layers: int
    dtype: torch.dtype
    stored: Mapping[str, LowBitForm]  # of the folder's weights that are in few bits
    rounded: str | None  # of FORMATS, what full projections become

    @property
    def low_bit(self) -> Mapping[str, LowBitForm]:
        """The forms of the weights that are measured."""
        if self.rounded:
            return low_bit_forms(self.config, self.rounded, self.dtype)
        return self.stored


def run_bench(folder: str | None, options: BenchOptions) -> dict[str, Any]:
    """Measure a model, with a progress bar on a terminal.

    Args:
        folder: the checkpoint, None: the embedded one, or what `options.model` names.
        options: all others; see there.

    Returns:
        A dictionary that json can write: what `measure_speed` returns, and
        model: source (folder or name), family, weights ("random" or "checkpoint"), layers,
        of_layers (those of the published model), parameters, bytes;
        load: batch, prompt, new; repeats;
        dtype; weights: "int4", "int8", "fp8", or the dtype; device; backends: op -> backend;
        limits: read_gb_s, copy_gb_s and matmul_gflop_s of this run, and matmul_dtype;
        environment: see `mistral_kernels.environment`.

    Raises:
        ValueError: options contradict each other, the model or the free memory.
        OSError: there is no such folder.
    """
    load = Load(options.batch, options.prompt, options.new)
    device = torch_device(options.device)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    subject = _subject(folder, options)
    _check_positions(subject.config, load)
    nbytes = _check_memory(subject, load, device, options.backend)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        limits = _limits(device)
        model = _made(subject, options, device)
        with _bar() as progress:
            task = progress.add_task("", total=steps_of(load, options.repeats))
            figures = measure_speed(
                *(model, load, limits),
                repeats=options.repeats,
                advance=lambda: progress.advance(task),
            )
        machine = environment()
    kinds = weight_kinds(model.low_bit)
    return {
        "model": {
            "source": str(subject.folder or options.model),
            "family": family_of(subject.config),
            "weights": "checkpoint" if subject.folder else "random",
            "layers": subject.config.layers,
            "of_layers": subject.published_layers,
            "parameters": model.num_parameters(),
            "bytes": nbytes,
        },
        "load": load._asdict(),
        "repeats": options.repeats,
        "dtype": _name(model.dtype),
        "weights": "+".join(kinds) or _name(model.dtype),
        "device": str(device),
        "backends": model.backends,
        **figures,
        "limits": limits._asdict() | {"matmul_dtype": _name(MATMUL[device.type][1])},
        "environment": machine,
    }


def _subject(folder: str | None, options: BenchOptions) -> Subject:
    """What to measure, from options that fit together and files whose headers are sound."""
    dtype = torch_dtype(options.dtype)
    if options.weights == Weights.bf16:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"--weights bf16: full weights are held in --dtype, got {_name(dtype)}"
            )
        dtype = torch.bfloat16
    rounded = options.weights if options.weights in FORMATS else None
    if options.model is not None:
        if folder is not None:
            raise ValueError(f"--model {options.model} and FOLDER {folder} exclude each other")
        if not options.random_weights:
            raise ValueError(
                f"--model {options.model} gives a shape without weights: add --random-weights,"
                " or name a FOLDER"
            )
        config, layers = _known_config(options.model, options.layers)
        return _checked(Subject(None, config, layers, dtype or torch.bfloat16, {}, rounded))
    for option, given in (
        ("--random-weights", options.random_weights),
        ("--layers", options.layers is not None),
    ):
        if given:
            raise ValueError(f"{option} needs --model NAME, whose shape it is about")
    place = resolve_folder(TINY_MIXTRAL if folder is None else folder)
    checkpoint = Checkpoint(place, ModelConfig.from_folder(place))
    kinds = weight_kinds(checkpoint.forms)
    if kinds and options.weights and kinds != [options.weights]:
        raise ValueError(
            f"--weights {options.weights}: the weights of {place} are {' and '.join(kinds)} already"
        )
    config = checkpoint.config
    return _checked(
        Subject(
            *(place, config, config.layers, dtype or checkpoint.dtype, checkpoint.forms),
            None if kinds else rounded,
        )
    )


def _checked(subject: Subject) -> Subject:
    """The subject; a ValueError if its rows cannot be cut into groups."""
    try:
        _ = subject.low_bit
    except ValueError as error:
        raise ValueError(f"--weights {error}") from error
    return subject


def _known_config(name: str, layers: int | None) -> tuple[ModelConfig, int]:
    """The first layers of a published model, and how many it has."""
    try:
        config = ModelConfig.known(name)
    except ValueError as error:
        raise ValueError(f"--model: {str(error).removeprefix('known: ')}") from error
    if layers is None:
        return config, config.layers
    if layers > config.layers:
        raise ValueError(f"--layers: expected at most the {config.layers} of {name}, got {layers}")
    return replace(config, layers=layers, windows=config.windows[:layers]), config.layers


def _check_positions(config: ModelConfig, load: Load) -> None:
    if config.max_positions is not None and load.tokens > config.max_positions:
        raise ValueError(
            f"--prompt {load.prompt} and --new {load.new}: expected at most the"
            f" {config.max_positions} tokens that the model was made for, got {load.tokens}"
        )


def _check_memory(subject: Subject, load: Load, device: torch.device, backend: str) -> int:
    """The bytes of the weights; a ValueError if they, cache and a step's tensors do not fit."""
    config, dtype = subject.config, subject.dtype
    # On the meta device a model takes no memory; it refuses an unknown backend.
    Transformer(config, device="meta", backend=backend)
    how = {"device": device, "dtype": dtype, "low_bit": subject.low_bit}
    nbytes = _weight_bytes(config, dtype, subject.low_bit)
    needs = {
        "weights": nbytes,
        "cache": load.batch * cache_bytes(config, load.tokens, dtype),
        "working": working_bytes(
            *(config, dtype, choose_backends(config, **how)),
            tokens=load.batch * load.prompt,
            context=load.tokens,
            batch=load.batch,
        ),
    }
    if subject.folder and subject.rounded:
        needs["weights before they are rounded"] = _weight_bytes(config, dtype, subject.stored)
    free, total = free_memory()[str(device)], sum(needs.values())
    if free is not None and total > free:
        parts = ", ".join(f"{name} {byte_size(size)}" for name, size in needs.items())
        raise ValueError(
            f"{device} has {byte_size(free)} of memory free and {byte_size(total)} are needed"
            f" ({parts}): less --batch, --prompt or --layers, or --weights in fewer bits"
        )
    return nbytes


def _weight_bytes(
    config: ModelConfig, dtype: torch.dtype, low_bit: Mapping[str, LowBitForm]
) -> int:
    return sum(part["bytes"] for part in part_sizes(config, dtype, low_bit).values())


def _limits(device: torch.device) -> Limits:
    """The limits of a device, from no more than half of what is free there."""
    wanted = STREAM_BYTES[device.type]
    free = free_memory()[str(device)]
    if free is not None:
        wanted = max(1 << 16, min(wanted, free // 4 >> 16 << 16))
    limits = machine_limits(device.type, wanted)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return limits


def _made(subject: Subject, options: BenchOptions, device: torch.device) -> Transformer:
    how = {"device": device, "dtype": subject.dtype, "max_batch_size": options.batch}
    if subject.folder is None:
        torch.manual_seed(0)
        made = {"weights": subject.rounded, "backend": options.backend}
        return random_model(subject.config, **how, **made)
    full = Transformer.from_folder(subject.folder, backend=options.backend, **how)
    return in_few_bits(full, subject.rounded, backend=options.backend) if subject.rounded else full


def weight_kinds(forms: Mapping[str, LowBitForm]) -> list[str]:
    """The names of FORMATS of the codes that weights are in, sorted."""
    codes = {form.codes for form in forms.values()}
    return sorted(name for name, (kind, _) in FORMATS.items() if kind in codes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bar() -> Progress:
    """A bar on stderr that counts rounds of tokens and vanishes at its end."""
    console = Console(stderr=True)
    quiet = console.is_dumb_terminal or not (sys.stderr and sys.stderr.isatty())
    columns = ("steps", BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=quiet)
