"""What `mistral-kernels bench` does: measures a model and the limits of its machine."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from mistral_kernels.bench_options import BenchOptions
from mistral_kernels.bench_subject import Subject, subject_of, weight_kinds
from mistral_kernels.checkpoint_info import cache_bytes, part_sizes, working_bytes
from mistral_kernels.environment import environment
from mistral_kernels.free_memory import free_memory
from mistral_kernels.machine_limits import MATMUL, STREAM_BYTES, Limits, machine_limits
from mistral_kernels.model.backends import choose_backends
from mistral_kernels.model.cache import MOST_TOKENS
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.families import family_of
from mistral_kernels.model.low_bit_weight import LowBitForm
from mistral_kernels.model.progress_bar import counting_bar
from mistral_kernels.model.prompt_chunks import step_tokens
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.model_speed import Load, measure_speed, steps_of
from mistral_kernels.options import torch_device
from mistral_kernels.tables import byte_size


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
    subject = subject_of(folder, options)
    _check_positions(subject.config, load)
    nbytes = _check_memory(subject, load, device, options.backend)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        limits = _limits(device)
        model = subject.made(backend=options.backend, device=device)
        with counting_bar("steps") as progress:
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
            "of_layers": subject.of_layers,
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


def _check_positions(config: ModelConfig, load: Load) -> None:
    most = MOST_TOKENS if config.max_positions is None else config.max_positions
    if load.tokens > most:
        raise ValueError(
            f"--prompt {load.prompt} and --new {load.new}: expected at most the {most} tokens that"
            f" a sequence of the model can have, got {load.tokens}"
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
            tokens=min(load.batch * load.prompt, step_tokens(config, dtype, device.type)),
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
