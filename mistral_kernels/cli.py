"""The command line, `mistral-kernels`: bench, chat, generate, info, ppl, quantize, verify.

stdout carries only the result (text, JSON or a table); rates, progress and errors go to stderr.
Exit status: 0; 1 where `verify` finds a miss; 2 for bad input, told in one line; 130 after Ctrl-C.
Everything heavy is imported inside the commands, so that --help and --version answer at once.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mistral_kernels.bench_options import BenchOptions
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.option_groups import takes
from mistral_kernels.options import (
    AllowPickleOption,
    DeviceOption,
    Dtype,
    FolderArgument,
    JsonOption,
    LayoutOption,
    Loading,
    LowBitFormat,
    Sampling,
    load_model,
    torch_device,
    torch_dtype,
)
from mistral_kernels.rates import rates_line
from mistral_kernels.text_input import MessageReader, given_text, read_prompt, read_text

logger = logging.getLogger("mistral_kernels")

EMBEDDED = str(TINY_MIXTRAL)

# No rich markup: it would take the brackets of "[default: ...]" for tags.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    # The name that typer gives this exception is private in some of its releases.
    usage_error = typer.BadParameter.__base__
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
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


@app.command()
@takes(sampling=Sampling(max_tokens=256, temperature=0.0), loading=Loading())
def generate(
    folder: FolderArgument = EMBEDDED,
    *,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File to read it from [default: stdin].")
    ] = None,
    sampling: Sampling,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given repeatedly.")
    ] = None,
    loading: Loading,
    stream: Annotated[
        bool | None, typer.Option(help="Show text as it comes [default: yes, but not with --json].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text; the rates of prompt and decode go to stderr."""
    if as_json and stream:
        raise ValueError("--stream and --json exclude each other")
    text = read_prompt(prompt, prompt_file)

    from mistral_kernels.continuation import continue_text
    from mistral_kernels.model.stop_text import stop_strings

    stops = stop_strings(stop, "--stop")
    model, tokenizer = load_model(folder, loading, sampling)
    show = not (as_json or stream is False)
    result = continue_text(model, tokenizer, text, sampling, stop=stops, show=show)
    if as_json:
        print(json.dumps(result))
    elif stream is False:
        print(result["text"])
    print(rates_line(result["timings"]), file=sys.stderr)


@app.command()
@takes(sampling=Sampling(max_tokens=1024, temperature=0.7), loading=Loading())
def chat(
    folder: FolderArgument = EMBEDDED,
    *,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    system_file: Annotated[Path | None, typer.Option(help="File to read it from.")] = None,
    sampling: Sampling,
    context: Annotated[
        int | None,
        typer.Option(help="Most tokens of a conversation [default: the model's, at most 8192]."),
    ] = None,
    loading: Loading,
) -> None:
    """Talk with a model; /help tells what else can be typed."""
    system = given_text("--system", system, system_file)
    reader = MessageReader()

    from mistral_kernels.chat import run_chat

    model, tokenizer = load_model(folder, loading, sampling, for_chat=True)
    run_chat(model, tokenizer, reader, sampling, system=system, context=context)


@app.command()
def info(
    folder: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, or org/name of the Hugging Face hub [default: tell of this"
            " installation and machine]."
        ),
    ] = None,
    layout: LayoutOption = None,
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
@takes(loading=Loading())
def ppl(
    folder: FolderArgument = EMBEDDED,
    *,
    text: Annotated[Path, typer.Option(help="File of the text to predict.")],
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line is a text of its own, its end included.")
    ] = False,
    context: Annotated[
        int | None,
        typer.Option(
            help="Most tokens fed before the text is cut [default: no limit with windows, else the"
            " model's, at most 8192]."
        ),
    ] = None,
    loading: Loading,
    as_json: JsonOption = False,
) -> None:
    """Measure how well a model predicts a text: nats a token and perplexity."""
    content = read_text(text)

    from mistral_kernels.evaluation import evaluate
    from mistral_kernels.tables import print_perplexity

    model, tokenizer = load_model(folder, loading)
    facts = evaluate(model, tokenizer, content, by_line=lines, context=context)
    if as_json:
        print(json.dumps(facts))
    else:
        print_perplexity(facts)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Checkpoint folder, or org/name of the hub.")],
    folder: Annotated[Path, typer.Argument(help="Where the new checkpoint goes.")],
    *,
    format: Annotated[LowBitFormat, typer.Option(help="What each weight becomes.")],
    group_size: Annotated[
        int | None,
        typer.Option(help="Of int4, weights that share a scale; 0: all of a row [default: 128]."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File of texts, one a line, whose activations the weights are fitted to."
        ),
    ] = None,
    device: DeviceOption = None,
    layout: LayoutOption = None,
    allow_pickle: AllowPickleOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint that is there.")
    ] = False,
) -> None:
    """Write a checkpoint with low-bit weights, as compressed-tensors stores them."""
    texts = calibration and [line for line in read_text(calibration).splitlines() if line.strip()]

    from mistral_kernels.model.quantising import quantise_folder
    from mistral_kernels.model.staged_folder import staging_place
    from mistral_kernels.tables import byte_size

    try:
        done = quantise_folder(
            source,
            folder,
            format=format.value,
            group_size=group_size,
            calibration=texts,
            device=torch_device(device),
            layout=layout,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        place = staging_place(folder.resolve())
        if place.exists():
            print(f"{place} holds what is done; the same command goes on there", file=sys.stderr)
        raise
    sizes = f"{byte_size(done.bytes_before)} became {byte_size(done.bytes_after)}"
    share = done.bytes_after / done.bytes_before
    print(f"{done.folder}: {format.value}, {sizes} ({share:.1%})")


@app.command()
def verify(
    folder: FolderArgument = EMBEDDED,
    backend: Annotated[
        str | None, typer.Option(help="Check only this one and the reference [default: all].")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the model.")] = Dtype.float32,
    device: DeviceOption = None,
    allow_pickle: AllowPickleOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check each backend's logits of one prompt against float64; status 1 if one misses."""
    from mistral_kernels.tables import print_report
    from mistral_kernels.verify import verify

    report = verify(
        folder,
        backend=backend,
        dtype=torch_dtype(dtype),
        device=torch_device(device),
        allow_pickle=allow_pickle,
    )
    asked = next((row for row in report.rows if row.backend == backend), None)
    if asked and asked.result == "not available":
        raise ValueError(f"--backend {backend} is not available: {asked.reason}")
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        print_report(report)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
@takes(options=BenchOptions())
def bench(
    folder: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, or org/name of the Hugging Face hub"
            " [default: a tiny built-in model]."
        ),
    ] = None,
    *,
    options: BenchOptions,
) -> None:
    """Measure prefill and decode, beside the limits of this machine in the same run."""
    printed = options.json == Path("-")
    out = None if printed else options.json
    # Asked before anything is measured. The file is replaced by a new one, which a device or a pipe
    # must not be.
    if out and (out.exists() and not out.is_file() or not _is_writable(out.absolute().parent)):
        raise ValueError(f"--json: expected a file in a writable folder, or -, got {out}")

    from mistral_kernels.bench import run_bench
    from mistral_kernels.tables import print_speed
    from mistral_kernels.whole_file import write_json

    facts = run_bench(folder, options)
    if printed:
        print(json.dumps(facts))
    else:
        print_speed(facts)
    if out:
        write_json(out, facts)


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


if __name__ == "__main__":
    main()
