"""Options that several commands share, and the device, dtype and model that they stand for."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from mistral_kernels.lora_options import (
    LoraOption,
    LoraScalingOption,
    LoraWeightOption,
    asked_adapters,
    load_adapters,
)

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


class LowBitFormat(StrEnum):
    """What `quantize` makes of weights."""

    int4 = "int4"
    int8 = "int8"
    fp8 = "fp8"


# No Path: to it "./org/name", a folder, and "org/name", a model of the hub, are the same.
FolderArgument = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder, or org/name of the Hugging Face hub"
        " [default: a tiny built-in model].",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N [default: cuda if present].")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON object to stdout.")]
LayoutOption = Annotated[Layout | None, typer.Option(help="Where a folder holds both.")]
AllowPickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Also read .pth, .pt and .bin files, without running code of theirs."
    ),
]


class Sampling(NamedTuple):
    """How text is drawn: what `mistral_kernels.stream` takes under the same names."""

    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")]
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")]
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 1.0
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None
    chunk_size: Annotated[
        int | None, typer.Option(help="Read the prompt in pieces of this many tokens.")
    ] = None


class Loading(NamedTuple):
    """How a model is loaded: what `Transformer.from_folder` takes, and adapters."""

    lora: LoraOption = None
    lora_scaling: LoraScalingOption = None
    lora_weight: LoraWeightOption = None
    dtype: Annotated[Dtype | None, typer.Option(help="[default: the checkpoint's].")] = None
    device: DeviceOption = None
    backend: Annotated[
        str, typer.Option(help="Preferred kernels: reference, cpu, triton or cuda.")
    ] = "auto"
    layout: LayoutOption = None
    allow_pickle: AllowPickleOption = False
    dequantise: Annotated[
        bool, typer.Option("--dequantise", help="Widen low-bit weights, as adapters need it.")
    ] = False


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
    folder: str, loading: Loading, sampling: Sampling | None = None, *, for_chat: bool = False
) -> tuple[Transformer, Tokenizer]:
    """The model of a folder, loaded as the options ask for, and its tokenizer.

    What is wrong with options or files is told before the weights, which may take minutes to read.
    With `for_chat` a tokenizer that cannot encode a conversation is refused.
    """
    from mistral_kernels import ModelConfig, Transformer, stream
    from mistral_kernels.model.tokenizer import Tokenizer

    config = ModelConfig.from_folder(folder, loading.layout)
    # On the meta device a model takes no memory, and without a prompt it runs nothing.
    trial = Transformer(config, device="meta", backend=loading.backend)
    if sampling:
        stream([], trial, **sampling._asdict())
    tokenizer = Tokenizer.from_folder(folder, config)
    tokenizer.check_fits(config)
    if for_chat and tokenizer.chat_refusal:
        raise ValueError(tokenizer.chat_refusal)
    adapters = asked_adapters(config, loading.lora, loading.lora_scaling, loading.lora_weight)
    model = Transformer.from_folder(
        folder,
        device=torch_device(loading.device),
        dtype=torch_dtype(loading.dtype),
        backend=loading.backend,
        layout=loading.layout,
        allow_pickle=loading.allow_pickle,
        dequantise=loading.dequantise,
    )
    model.tokenizer = tokenizer
    load_adapters(model, adapters)
    return model, tokenizer
