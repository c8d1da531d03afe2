"""What `mistral-kernels generate` does: writes how a model continues a text."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress

import mistral_kernels
from mistral_kernels.model.stop_text import StopText
from mistral_kernels.model.tokenizer import TextStream, Tokenizer
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.options import Sampling
from mistral_kernels.rates import timings


def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    *,
    stop: tuple[str, ...],
    show: bool,
) -> dict[str, Any]:
    """Generate, write the text to stdout as it comes if `show`, and return what --json writes."""
    ids = tokenizer.encode(prompt)
    stream = TextStream(tokenizer, continued=True)
    before_stop = StopText(stop)
    pieces, tokens, logprobs, times = [], [], [], [time.perf_counter()]
    hidden = show or not (sys.stderr and sys.stderr.isatty())
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("tokens", total=sampling.max_tokens)
        for _, token, logprob in mistral_kernels.stream(
            [ids], model, eos_id=tokenizer.eos_id, stop=stop, **sampling._asdict()
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
        "timings": timings(len(ids), len(tokens), times),
    }
