"""What `mistral-kernels ppl` does: feeds a text to a model and tells how well it was predicted."""

from __future__ import annotations

import time
from typing import Any

from mistral_kernels.model.conversation import DEFAULT_CONTEXT
from mistral_kernels.model.perplexity import perplexity
from mistral_kernels.model.progress_bar import counting_bar
from mistral_kernels.model.tokenizer import Tokenizer
from mistral_kernels.model.transformer import Transformer


def evaluate(
    model: Transformer, tokenizer: Tokenizer, text: str, *, by_line: bool, context: int | None
) -> dict[str, Any]:
    """Measure the perplexity of a text, with a progress bar on a terminal.

    Args:
        model, tokenizer: of one checkpoint.
        text: what is predicted.
        by_line: each line that is not empty is a text of its own, and its end is predicted too.
        context: most tokens a prediction rests on; None: what the windows of the layers let it
            see, and with a layer that has none as many as the model was made for, at most
            DEFAULT_CONTEXT.

    Returns:
        A dictionary that json can write: nats_per_token, perplexity, tokens (predicted ones),
        texts, context (None: all), seconds, tokens_per_s, dtype, device.

    Raises:
        ValueError, RuntimeError: as `perplexity`.
    """
    end = [tokenizer.eos_id] if by_line and tokenizer.eos_id is not None else []
    lines = [line for line in text.splitlines() if line.strip()] if by_line else [text]
    texts = [tokenizer.encode(line) + end for line in lines]
    if context is None and None in model.config.windows:
        context = min(model.config.max_positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    start = time.perf_counter()
    with counting_bar("tokens") as progress:
        task = progress.add_task("", total=sum(max(len(ids) - 1, 0) for ids in texts))
        found = perplexity(
            model, texts, context=context, advance=lambda n: progress.advance(task, n)
        )
    seconds = time.perf_counter() - start
    return {
        "nats_per_token": found.nats_per_token,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "texts": len(texts),
        "context": context,
        "seconds": seconds,
        "tokens_per_s": found.tokens / seconds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
