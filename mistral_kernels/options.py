"""Options that several commands share, and the device, dtype and model that they stand for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mistral_kernels.lora_options import asked_adapters, load_adapters
from mistral_kernels.model import TINY_MIXTRAL

if TYPE_CHECKING:
    import torch

    from mistral_kernels import Transformer
    from mistral_kernels.model.tokenizer import Tokenizer


class Dtype(StrEnum):
    """Dtypes that a model can run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Layout(StrEnum):
    """Checkpoint layouts."""

    native = "native"
    huggingface = "huggingface"


# No Path: to it "./org/name", a folder, and "org/name", a model of the hub, are the same.
FolderArgument = Annotated[
    str | None,
    typer.Argument(
        help="Checkpoint folder, or org/name of the Hugging Face hub"
        " [default: a tiny built-in model]."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N [default: cuda if present].")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="[default: the checkpoint's].")]
BackendOption = Annotated[
    str, typer.Option(help="Preferred kernels: reference, cpu, triton or cuda.")
]
LayoutOption = Annotated[Layout | None, typer.Option(help="Where a folder holds both.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Most new tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopPOption = Annotated[float, typer.Option(help="Sample from this much probability.")]
TopKOption = Annotated[int | None, typer.Option(help="Sample from this many tokens.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
ChunkSizeOption = Annotated[
    int | None, typer.Option(help="Read the prompt in pieces of this many tokens.")
]


class Sampling(NamedTuple):
    """The options that `mistral_kernels.stream` takes under the same names."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    chunk_size: int | None


def torch_device(name: str | None) -> torch.device | None:
    """What --device names; None: the model's default."""
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def torch_dtype(name: Dtype | None) -> torch.dtype | None:
    """What --dtype names; None: the model's default."""
    import torch

    return name and getattr(torch, name)


def load_model(
    folder: str | Path | None,
    *,
    device: str | None,
    dtype: Dtype | None,
    backend: str,
    layout: Layout | None,
    lora: list[Path] | None,
    lora_scaling: list[float] | None,
    lora_weight: list[float] | None,
    for_chat: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """The model that the options of the same names ask for, and its tokenizer.

    With `for_chat` a tokenizer that cannot encode a conversation is refused.
    """
    from mistral_kernels import ModelConfig, Transformer
    from mistral_kernels.model.tokenizer import Tokenizer

    folder = folder or TINY_MIXTRAL
    config = ModelConfig.from_folder(folder, layout)
    tokenizer = Tokenizer.from_folder(folder, config)
    # Before the weights, which may take minutes to read.
    tokenizer.check_fits(config)
    if for_chat and tokenizer.chat_refusal:
        raise ValueError(tokenizer.chat_refusal)
    adapters = asked_adapters(config, lora, lora_scaling, lora_weight)
    model = Transformer.from_folder(
        folder,
        device=torch_device(device),
        dtype=torch_dtype(dtype),
        backend=backend,
        layout=layout,
    )
    model.tokenizer = tokenizer
    load_adapters(model, adapters)
    return model, tokenizer
