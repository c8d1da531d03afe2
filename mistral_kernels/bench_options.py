"""The options of `bench`: what model, in what form, on what load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from mistral_kernels.options import DeviceOption, Dtype


class Weights(StrEnum):
    """What the projections are held in."""

    bf16 = "bf16"
    int4 = "int4"
    int8 = "int8"
    fp8 = "fp8"


class BenchOptions(NamedTuple):
    """What is measured."""

    model: Annotated[
        str | None, typer.Option(help="Take the shape of this published model, not a FOLDER.")
    ] = None
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --model: random weights, no download.")
    ] = False
    layers: Annotated[
        int | None, typer.Option(min=1, help="With --model: only its first layers.")
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512
    new: Annotated[int, typer.Option(min=2, help="New tokens after each.")] = 128
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, after one that is not.")] = 3
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Dtype of the model [default: the checkpoint's; random: bfloat16]."),
    ] = None
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="What projections are held in; full ones are rounded to int4 (groups of 128), int8"
            " or fp8 (a scale a row) [default: as they are]."
        ),
    ] = None
    backend: Annotated[
        str, typer.Option(help="Preferred kernels: reference, cpu, triton or cuda.")
    ] = "auto"
    device: DeviceOption = None
    json: Annotated[
        Path | None, typer.Option(help="Also write all figures to this file; -: print only them.")
    ] = None
