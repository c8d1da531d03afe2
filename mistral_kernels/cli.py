"""The command line: `mistral-kernels generate`, `info` and `verify`.

stdout carries only the result (text, JSON or a table); rates, progress and errors go to stderr.
Exit status: 0; 1 where `verify` finds a miss; 2 for bad input, told in one line; 130 after Ctrl-C.
Everything heavy is imported inside the commands, so that --help and --version answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mistral_kernels.lora_options import (
    LoraOption,
    LoraScalingOption,
    LoraWeightOption,
    asked_adapters,
    load_adapters,
)
from mistral_kernels.model import TINY_MIXTRAL

if TYPE_CHECKING:
    import torch

    from mistral_kernels import Transformer
    from mistral_kernels.model.tokenizer import Tokenizer

logger = logging.getLogger("mistral_kernels")

# No rich markup: it would take the brackets of "[default: ...]" for tags.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    # The name that typer gives this exception is private in some of its releases.
    usage_error = typer.BadParameter.__base__
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(arguments or ["--help"], prog_name="mistral-kernels", standalone_mode=False)
        if sys.stdout:  # None if it was closed, as stdin and stderr may be
            sys.stdout.flush()
    except usage_error as error:
        _fail(error.format_message())
    except BrokenPipeError:
        # Nobody reads on. Without this, Python's own flush at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    # RuntimeError: no memory left on the device, or logits that are not finite.
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        logger.debug("the command failed", exc_info=error)
        _fail(str(error))
    sys.exit(status)


def _fail(message: str) -> None:
    print("mistral-kernels:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mistral_kernels import __version__

        print(__version__)
        raise typer.Exit


@app.callback(help="Run, inspect and check Mistral and Mixtral models.")
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None: ...


class Sampling(NamedTuple):
    """The options that `mistral_kernels.stream` takes under the same names."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None
    chunk_size: int | None
    stop: tuple[str, ...]


@app.command()
def generate(
    folder: FolderArgument = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File to read it from [default: stdin].")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Read the prompt in pieces of this many tokens.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given repeatedly.")
    ] = None,
    lora: LoraOption = None,
    lora_scaling: LoraScalingOption = None,
    lora_weight: LoraWeightOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="[default: the checkpoint's].")] = None,
    device: DeviceOption = None,
    backend: Annotated[
        str, typer.Option(help="Preferred kernels: reference, cpu, triton or cuda.")
    ] = "auto",
    layout: Annotated[Layout | None, typer.Option(help="Where a folder holds both.")] = None,
    stream: Annotated[
        bool | None, typer.Option(help="Show text as it comes [default: yes, but not with --json].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text; the rates of prompt and decode go to stderr."""
    if as_json and stream:
        raise ValueError("--stream and --json exclude each other")
    text = _read_prompt(prompt, prompt_file)

    from mistral_kernels import ModelConfig, Transformer
    from mistral_kernels.model.stop_text import stop_strings
    from mistral_kernels.model.tokenizer import Tokenizer

    stops = stop_strings(stop, "--stop")
    folder = folder or TINY_MIXTRAL
    config = ModelConfig.from_folder(folder, layout)
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_fits(config)  # before the weights, which may take minutes to read
    adapters = asked_adapters(config, lora, lora_scaling, lora_weight)
    model = Transformer.from_folder(
        folder, device=_device(device), dtype=_dtype(dtype), backend=backend, layout=layout
    )
    model.tokenizer = tokenizer
    load_adapters(model, adapters)
    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed, chunk_size, stops)
    result = _continue_text(model, tokenizer, text, sampling, show=not (as_json or stream is False))
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    elif stream is False:
        print(result["text"])
    _print_rates(result)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt given, or the text of the file or stdin without the newline at its end."""
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt-file exclude each other")
    if prompt is not None:
        source, data = "--prompt", os.fsencode(prompt)  # the bytes that the shell passed
    elif prompt_file is not None:
        source, data = str(prompt_file), _without_newline(prompt_file.read_bytes())
    else:
        if sys.stdin is None:
            raise ValueError("stdin is closed: give a --prompt or a --prompt-file")
        if sys.stdin.isatty():
            print("Type the prompt; Ctrl-D on an empty line ends it.", file=sys.stderr)
        source, data = "stdin", _without_newline(sys.stdin.buffer.read())
    if not data:
        raise ValueError(f"{source}: the prompt is empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: the prompt is not UTF-8: {error}") from error


def _without_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _device(name: str | None) -> torch.device | None:
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


def _dtype(name: Dtype | None) -> torch.dtype | None:
    import torch

    return name and getattr(torch, name)


def _continue_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: Sampling, *, show: bool
) -> dict[str, Any]:
    """Generate, write the text to stdout as it comes if `show`, and return what --json writes."""
    from rich.console import Console
    from rich.progress import Progress

    import mistral_kernels
    from mistral_kernels.model.stop_text import StopText
    from mistral_kernels.model.tokenizer import TextStream

    ids = tokenizer.encode(prompt)
    stream = TextStream(tokenizer, continued=True)
    before_stop = StopText(sampling.stop)
    pieces, tokens, logprobs, times = [], [], [], [time.perf_counter()]
    hidden = show or not (sys.stderr and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("tokens", total=sampling.max_tokens)
        for _, token, logprob in mistral_kernels.stream(
            [ids], model, eos_id=tokenizer.eos_id, **sampling._asdict()
        ):
            times.append(time.perf_counter())
            tokens.append(token)
            logprobs.append(logprob)
            pieces.append(before_stop.push(stream.push(token)))
            progress.advance(task)
            if show:
                print(pieces[-1], end="", flush=True)
        times.append(time.perf_counter())
    pieces.append(before_stop.push(stream.finish()) + before_stop.finish())
    if show:
        print(pieces[-1])
    ended = before_stop.stopped or len(tokens) < sampling.max_tokens
    return {
        "prompt": prompt,
        "text": "".join(pieces),
        "tokens": tokens,
        "logprobs": logprobs,
        "finish_reason": "stop" if ended else "length",
        "timings": _timings(len(ids), len(tokens), times),
    }


def _timings(prompt_tokens: int, new_tokens: int, times: list[float]) -> dict[str, Any]:
    """Times of the prompt, which yields the first token, and of the tokens after it.

    `times` holds the start, the arrival of each new token, and the end.
    """
    prompt_s = times[1] - times[0]
    decode_s = times[new_tokens] - times[1]
    decoded = max(new_tokens - 1, 0)
    return {
        "prompt_tokens": prompt_tokens,
        "prompt_ms": prompt_s * 1e3,
        "prompt_tokens_per_s": prompt_tokens / prompt_s,
        "decode_tokens": decoded,
        "decode_ms": decode_s * 1e3 if decoded else 0.0,
        "decode_tokens_per_s": decoded / decode_s if decoded else None,
    }


def _print_rates(result: dict[str, Any]) -> None:
    timings, parts = result["timings"], []
    for phase in ("prompt", "decode"):
        rate = timings[f"{phase}_tokens_per_s"]
        parts.append(
            f"{phase}: {timings[f'{phase}_tokens']} tokens in {timings[f'{phase}_ms']:.1f} ms"
            + (f" ({rate:.1f} tokens/s)" if rate else "")
        )
    print("; ".join(parts), file=sys.stderr)


@app.command()
def info(
    folder: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, or org/name of the Hugging Face hub [default: tell of this"
            " installation and machine]."
        ),
    ] = None,
    layout: Annotated[Layout | None, typer.Option(help="Where a folder holds both.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell of this installation and machine, or of a checkpoint and whether it fits here."""
    from mistral_kernels import tables

    if folder is None:
        from mistral_kernels.info import collect

        facts, show = collect(), tables.print_info
    else:
        from mistral_kernels.checkpoint_info import collect_checkpoint

        facts, show = collect_checkpoint(folder, layout), tables.print_checkpoint
    if as_json:
        print(json.dumps(facts))
    else:
        show(facts)


@app.command()
def verify(
    folder: FolderArgument = None,
    backend: Annotated[
        str | None, typer.Option(help="Check only this one and the reference [default: all].")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the model.")] = Dtype.float32,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check each backend's logits of one prompt against float64; status 1 if one misses."""
    from mistral_kernels.tables import print_report
    from mistral_kernels.verify import verify

    report = verify(
        folder or TINY_MIXTRAL, backend=backend, dtype=_dtype(dtype), device=_device(device)
    )
    asked = next((row for row in report.rows if row.backend == backend), None)
    if asked and asked.result == "not available":
        raise ValueError(f"--backend {backend} is not available: {asked.reason}")
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        print_report(report)
    raise typer.Exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
