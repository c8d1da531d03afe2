"""The --lora options: adapters, each with its scaling and its weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from mistral_kernels import ModelConfig, Transformer

LoraOption = Annotated[
    list[Path] | None, typer.Option(help="Adapter to merge into the weights; repeatable.")
]
LoraScalingOption = Annotated[
    list[float] | None,
    typer.Option(help="Its factor, one for all or one each [default: the adapter's own]."),
]
LoraWeightOption = Annotated[
    list[float] | None, typer.Option(help="Its weight, one for all or one each [default: 1].")
]


class AskedAdapter(NamedTuple):
    """An adapter as the options ask for it."""

    path: Path
    scaling: float | None
    weight: float


def asked_adapters(
    config: ModelConfig,
    paths: list[Path] | None,
    scalings: list[float] | None,
    weights: list[float] | None,
) -> list[AskedAdapter]:
    """The adapters to load; their files are checked, before the weights take minutes to read."""
    from mistral_kernels.model.adapter_files import read_adapter

    paths = paths or []
    columns = []
    for option, values, default in (
        ("--lora-scaling", scalings, None),
        ("--lora-weight", weights, 1.0),
    ):
        if values and (not paths or len(values) not in (1, len(paths))):
            raise ValueError(
                f"{option}: expected one value, or one for each of {len(paths)} --lora,"
                f" got {len(values)}"
            )
        column = values or [default]
        columns.append(column * len(paths) if len(column) == 1 else column)
    for path in paths:
        read_adapter(path, config)
    return [AskedAdapter(*row) for row in zip(paths, *columns, strict=True)]


def load_adapters(model: Transformer, adapters: list[AskedAdapter]) -> None:
    """Merges adapters for good; the base is kept up to the last, so that the sum rounds once."""
    for i, adapter in enumerate(adapters, start=1):
        model.load_lora(
            adapter.path, adapter.scaling, weight=adapter.weight, keep_base=i < len(adapters)
        )
