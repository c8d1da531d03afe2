"""Generation: prompts in, tokens and their logprobs out, all at once or one by one.

One loop serves everything. Each place of the cache holds a sequence with pending tokens: at first
its prompt, fed in chunks, later the token it has just drawn. A step feeds every place its next
piece; places whose piece was the last draw a token. A place that is done takes the next waiting
prompt.

A step in which every place feeds one token and draws the next is a `decode_step`; all others, those
that read prompts, are calls of `forward`.

A step is fed and counted by the cache before its tokens are handed out, and between two steps
nothing is under way: there the loop may be left for good (cancelled, closed, interrupted).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.decode_step import Fed, decode
from mistral_kernels.model.generate_checks import Prompt, Settings
from mistral_kernels.model.generated_sequence import GeneratedSequence, checked_sequences
from mistral_kernels.model.prompt_chunks import even_chunk, step_tokens
from mistral_kernels.model.sampling import logprobs_of, sample
from mistral_kernels.model.transformer import Transformer

Event = tuple[int, int, float]  # sequence, token, logprob


def stream(
    encoded_prompts: Sequence[Prompt],
    model: Transformer,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | Sequence[int] | None = None,
    chunk_size: int | None = None,
    eos_id: int | None = None,
    prompt_logprobs: bool = False,
    stop: str | Sequence[str] | None = None,
    cache: KVCache | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Event]:
    """Yields (sequence, token, logprob) as tokens are drawn; arguments and errors as `generate`.

    With prompt_logprobs a prompt's own tokens, from the second on, are yielded before its new ones.
    The arguments are checked at the call, not at the first token. There is no on_token: whoever
    iterates sees every token as it is drawn, and may stop at any of them.
    """
    settings = Settings(
        max_tokens, temperature, top_p, top_k, chunk_size, eos_id, prompt_logprobs, stop, cancel
    )
    return _run(
        model, checked_sequences(encoded_prompts, model, settings, seed, cache), settings, cache
    )


def generate(
    encoded_prompts: Sequence[Prompt],
    model: Transformer,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | Sequence[int] | None = None,
    chunk_size: int | None = None,
    eos_id: int | None = None,
    prompt_logprobs: bool = False,
    stop: str | Sequence[str] | None = None,
    cache: KVCache | None = None,
    on_token: Callable[[int, int, float], None] | None = None,
    cancel: threading.Event | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Continues prompts.

    Args:
        encoded_prompts: of each its token ids (list, array or tensor) or its text; none empty. A
            text is encoded by `model.tokenizer`, with its begin-of-text id in front.
        model: at most its `max_batch_size` sequences run at once; others join as places free up.
            On a GPU steps in which all of them draw are replayed as CUDA graphs, kept with the
            cache, unless an op waits for the GPU (the reference), a hook, module or forward of the
            caller's takes part, or `model.use_graphs` is False.
        max_tokens: new tokens a sequence, >= 0.
        temperature: 0 for greedy; otherwise it divides the logits.
        top_p: then only the most likely tokens that together reach this probability, in (0, 1].
        top_k: only the k most likely tokens (taken before top_p); None for all.
        seed: sequence i draws from seed + i, or from seed[i], and the number of its own step, so
            its draws do not depend on the batch. None: from the system's randomness.
        chunk_size: most tokens of a prompt fed at once, which may be more than the window. None:
            of all prompts together so many that a step works with 2 GiB or less, at most 8192 on
            a GPU and 2048 on the CPU (`prompt_chunks.step_tokens`). How a prompt is cut may change
            the last bits of logprobs.
        eos_id: a sequence ends when it draws this token, which is not returned. None: a prompt
            given as text ends at the tokenizer's end-of-text id, one given as ids never.
        prompt_logprobs: put the logprobs of the prompt's tokens, from the second on, in front.
        stop: strings, one or a list; a sequence ends when the text of its new tokens holds one. The
            token that completes it is returned: `StopText` cuts the text. Prompts are not searched,
            and control tokens have no text. Needs `model.tokenizer`.
        cache: from `model.new_cache`, with one place a prompt: prompt i continues the tokens that
            place i holds; a text is encoded on its own, with a begin-of-text id only in an empty
            place. Afterwards a place holds its prompt and new tokens too, all but the last drawn,
            which was not fed. None: every prompt starts afresh.
        on_token: called with (sequence, token, logprob) of everything that `stream` would yield, as
            it is drawn. What it raises ends the generation and reaches the caller.
        cancel: once it is set, by any thread, by on_token or by a signal handler, no further step
            is fed (a chunk of a prompt is a step too), and what was drawn so far is returned.

    After an exception, KeyboardInterrupt included, the model is as before, and place i of a given
    cache holds the first tokens of what it was to hold, as many as `cache.lengths[i]` says.

    Returns:
        tokens: the new tokens of each prompt.
        logprobs: natural-log probability of each under the model's unscaled distribution.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
        RuntimeError: the model's logits are not finite.
    """
    if on_token is not None and not callable(on_token):
        raise TypeError(f"generate: on_token must be callable, got {type(on_token).__name__}")
    settings = Settings(
        max_tokens, temperature, top_p, top_k, chunk_size, eos_id, prompt_logprobs, stop, cancel
    )
    sequences = checked_sequences(encoded_prompts, model, settings, seed, cache)
    # A prompt's own tokens, which stream yields in front, are not returned.
    own = [len(sequence.pending) - 1 if prompt_logprobs else 0 for sequence in sequences]
    tokens: list[list[int]] = [[] for _ in sequences]
    logprobs: list[list[float]] = [[] for _ in sequences]
    for sequence, token, logprob in _run(model, sequences, settings, cache):
        tokens[sequence].append(token)
        logprobs[sequence].append(logprob)
        if on_token is not None:
            on_token(sequence, token, logprob)
    return [row[n:] for row, n in zip(tokens, own, strict=True)], logprobs


def _run(
    model: Transformer,
    sequences: list[GeneratedSequence],
    settings: Settings,
    cache: KVCache | None,
) -> Iterator[Event]:
    if not sequences:
        return
    places: list[GeneratedSequence | None]
    if cache is not None:
        places, waiting = list(sequences), deque()
    elif settings.max_tokens == 0 and not settings.prompt_logprobs:
        return  # nothing to find out, and no cache to fill
    else:
        longest = max(len(sequence.pending) for sequence in sequences)
        places, waiting = [None] * min(model.max_batch_size, len(sequences)), deque(sequences)
        cache = model.new_cache(len(places), longest + settings.max_tokens)
    while settings.cancel is None or not settings.cancel.is_set():
        for place, sequence in enumerate(places):
            if sequence is None and waiting:
                cache.reset(place)
                places[place] = waiting.popleft()
        if not any(places):
            return
        yield from _step(model, cache, places, settings)


def _step(
    model: Transformer,
    cache: KVCache,
    places: list[GeneratedSequence | None],
    settings: Settings,
) -> Iterator[Event]:
    """Feeds every place its next piece, frees places that are done, yields what was found out."""
    live = [(place, sequence) for place, sequence in enumerate(places) if sequence is not None]
    # A prompt's logprobs need the logits of all its rows.
    scored = settings.prompt_logprobs and any(s.drawn == 0 for _, s in live)
    each_draws = settings.max_tokens and all(len(s.pending) == 1 for _, s in live)
    # A forward or a run that the caller has replaced or compiled is called for every step.
    replaced = any(
        getattr(getattr(model, name), "__func__", None) is not getattr(Transformer, name)
        for name in ("forward", "run")
    )
    if each_draws and not replaced and not scored:
        fed = [Fed(at, *s.pending, s.draw(settings.temperature)) for at, s in live]
        drawn = decode(model, cache, fed, settings.sampling)
        yield from _events([place for place, _ in live], *drawn, places, settings)
        return

    chunk = settings.chunk_size
    if chunk is None:
        tokens = step_tokens(model.config, model.dtype, model.device.type, scored=scored)
        chunk = even_chunk([len(sequence.pending) for _, sequence in live], tokens)
    pieces = [sequence.pending[:chunk] if sequence else [] for sequence in places]
    input_ids = torch.tensor([token for piece in pieces for token in piece], device="cpu")
    with torch.inference_mode():
        logits = model.forward(input_ids, [len(p) for p in pieces], cache, last_only=not scored)
    events: list[Event] = []
    drawing: list[int] = []  # places whose pending tokens are all fed
    rows: list[int] = []  # and the rows of logits that they draw from
    begin = 0
    for place, sequence in live:
        piece = pieces[place]
        if scored and sequence.drawn == 0:
            events += _prompt_events(sequence, logits[begin : begin + len(piece)])
        begin += len(piece)
        sequence.pending = sequence.pending[len(piece) :]
        if not sequence.pending:
            drawing.append(place)
            rows.append(begin - 1 if scored else place)
    events += _draw(logits[rows], drawing, places, settings)
    yield from events


def _draw(
    logits: Tensor,
    drawing: list[int],
    places: list[GeneratedSequence | None],
    settings: Settings,
) -> list[Event]:
    """Draws one token for each place in `drawing`, from its row of logits."""
    if settings.max_tokens == 0:
        for place in drawing:
            places[place] = None
        return []
    draws = [places[place].draw(settings.temperature) for place in drawing]
    tokens = sample(logits, draws, **settings.sampling._asdict())
    logprobs = logprobs_of(logits, tokens)
    return _events(drawing, tokens.tolist(), logprobs.tolist(), places, settings)


def _events(
    drawing: list[int],
    tokens: list[int],
    logprobs: list[float],
    places: list[GeneratedSequence | None],
    settings: Settings,
) -> list[Event]:
    """Hands each place in `drawing` the token that it drew, and frees those that are done."""
    events = []
    for place, token, logprob in zip(drawing, tokens, logprobs, strict=True):
        sequence = places[place]
        _check_finite(logprob, sequence.index)
        sequence.drawn += 1
        sequence.pending = [token]
        if token == sequence.eos_id:
            places[place] = None
            continue
        events.append((sequence.index, token, logprob))
        if sequence.stops_at(token) or sequence.drawn == settings.max_tokens:
            places[place] = None
    return events


def _prompt_events(sequence: GeneratedSequence, logits: Tensor) -> list[Event]:
    """Logprobs of the prompt tokens that follow each row of logits, as far as the prompt goes."""
    followers = sequence.pending[1 : len(logits) + 1]
    tokens = torch.tensor(followers, dtype=torch.int64, device=logits.device)
    logprobs = logprobs_of(logits[: len(followers)], tokens).tolist()
    for logprob in logprobs:
        _check_finite(logprob, sequence.index)
    return [(sequence.index, *pair) for pair in zip(followers, logprobs, strict=True)]


def _check_finite(logprob: float, sequence: int) -> None:
    if math.isnan(logprob):
        raise RuntimeError(f"generate: the logits of sequence {sequence} are not finite")
