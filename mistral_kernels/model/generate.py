"""Generation: prompts in, tokens and their logprobs out, all at once or one by one.

One loop serves everything. Each place of the cache holds a sequence with pending tokens: at first
its prompt, fed in chunks, later the token it has just drawn. A step feeds every place its next
piece; places whose piece was the last draw a token. A place that is done takes the next waiting
prompt.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.sampling import logprobs_of, sample, uniform_draw
from mistral_kernels.model.transformer import Transformer
from mistral_kernels.ops.checks import is_int, is_number

Event = tuple[int, int, float]  # sequence, token, logprob


@dataclass
class _Sequence:
    """A sequence in its place: what it must still be fed, and how far it has drawn."""

    index: int
    pending: list[int]
    seed: int
    drawn: int = 0


@dataclass(frozen=True)
class _Sampling:
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    chunk_size: int | None
    eos_id: int | None
    prompt_logprobs: bool


def stream(
    encoded_prompts: Sequence[Sequence[int]],
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
    cache: KVCache | None = None,
) -> Iterator[Event]:
    """Yields (sequence, token, logprob) as tokens are drawn; arguments and errors as `generate`.

    With prompt_logprobs a prompt's own tokens, from the second on, are yielded before its new ones.
    The arguments are checked at the call, not at the first token.
    """
    sampling = _Sampling(max_tokens, temperature, top_p, top_k, chunk_size, eos_id, prompt_logprobs)
    _check_sampling(sampling, model.config.vocab)
    prompts = _check_prompts(encoded_prompts, model.config.vocab)
    seeds = _seeds(seed, len(prompts))
    waiting = deque(_Sequence(index, prompt, seeds[index]) for index, prompt in enumerate(prompts))
    if cache is not None:
        _check_cache(cache, prompts, max_tokens)
    return _run(model, waiting, sampling, cache)


def generate(
    encoded_prompts: Sequence[Sequence[int]],
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
    cache: KVCache | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Continues prompts.

    Args:
        encoded_prompts: token ids of each prompt, none empty, lengths free.
        model: at most its `max_batch_size` sequences run at once; others join as places free up.
        max_tokens: new tokens a sequence, >= 0.
        temperature: 0 for greedy; otherwise it divides the logits.
        top_p: then only the most likely tokens that together reach this probability, in (0, 1].
        top_k: only the k most likely tokens (taken before top_p); None for all.
        seed: sequence i draws from seed + i, or from seed[i], and the number of its own step, so
            its draws do not depend on the batch. None: from the system's randomness.
        chunk_size: prompt tokens fed at once; None: the whole prompt. Chunks may be longer than the
            window.
        eos_id: a sequence ends when it draws this token, which is not returned; None: never.
        prompt_logprobs: put the logprobs of the prompt's tokens, from the second on, in front.
        cache: from `model.new_cache`, with one place a prompt: prompt i continues the tokens that
            place i holds. Afterwards a place holds its prompt and new tokens too, all but the last
            drawn, which was not fed. None: every prompt starts afresh.

    Returns:
        tokens: the new tokens of each prompt.
        logprobs: natural-log probability of each under the model's unscaled distribution.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it.
        RuntimeError: the model's logits are not finite.
    """
    prompts = _check_prompts(encoded_prompts, model.config.vocab)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for sequence, token, logprob in stream(
        prompts,
        model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        chunk_size=chunk_size,
        eos_id=eos_id,
        prompt_logprobs=prompt_logprobs,
        cache=cache,
    ):
        tokens[sequence].append(token)
        logprobs[sequence].append(logprob)
    if prompt_logprobs:
        tokens = [row[len(prompt) - 1 :] for row, prompt in zip(tokens, prompts, strict=True)]
    return tokens, logprobs


def _run(
    model: Transformer, waiting: deque[_Sequence], sampling: _Sampling, cache: KVCache | None
) -> Iterator[Event]:
    if not waiting or (sampling.max_tokens == 0 and not sampling.prompt_logprobs):
        return
    places: list[_Sequence | None]
    if cache is not None:
        places = list(waiting)
        waiting.clear()
    else:
        longest = max(len(sequence.pending) for sequence in waiting)
        places = [None] * min(model.max_batch_size, len(waiting))
        cache = model.new_cache(len(places), longest + sampling.max_tokens)
    while True:
        for place, sequence in enumerate(places):
            if sequence is None and waiting:
                cache.reset(place)
                places[place] = waiting.popleft()
        if not any(places):
            return
        yield from _step(model, cache, places, sampling)


def _step(
    model: Transformer, cache: KVCache, places: list[_Sequence | None], sampling: _Sampling
) -> Iterator[Event]:
    """Feeds every place its next piece, frees places that are done, yields what was found out."""
    pieces = [sequence.pending[: sampling.chunk_size] if sequence else [] for sequence in places]
    # A prompt's logprobs need the logits of all its rows.
    scored = sampling.prompt_logprobs and any(s and s.drawn == 0 for s in places)
    input_ids = torch.tensor([token for piece in pieces for token in piece], device="cpu")
    with torch.inference_mode():
        logits = model.forward(input_ids, [len(p) for p in pieces], cache, last_only=not scored)
    events: list[Event] = []
    drawing: list[int] = []  # places whose pending tokens are all fed
    rows: list[int] = []  # and the rows of logits that they draw from
    begin = 0
    for place, (sequence, piece) in enumerate(zip(places, pieces, strict=True)):
        if sequence is None:
            continue
        if scored and sequence.drawn == 0:
            events += _prompt_events(sequence, logits[begin : begin + len(piece)])
        begin += len(piece)
        sequence.pending = sequence.pending[len(piece) :]
        if not sequence.pending:
            drawing.append(place)
            rows.append(begin - 1 if scored else place)
    events += _draw(logits[rows], drawing, places, sampling)
    yield from events


def _draw(
    logits: Tensor, drawing: list[int], places: list[_Sequence | None], sampling: _Sampling
) -> list[Event]:
    """Draws one token for each place in `drawing`, from its row of logits."""
    sequences = [places[place] for place in drawing]
    if sampling.max_tokens == 0:
        for place in drawing:
            places[place] = None
        return []
    tokens = sample(
        logits,
        [uniform_draw(s.seed, s.drawn) if sampling.temperature else 0.0 for s in sequences],
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    drawn = zip(
        drawing, sequences, tokens.tolist(), logprobs_of(logits, tokens).tolist(), strict=True
    )
    events = []
    for place, sequence, token, logprob in drawn:
        _check_finite(logprob, sequence.index)
        sequence.drawn += 1
        sequence.pending = [token]
        if token == sampling.eos_id:
            places[place] = None
            continue
        events.append((sequence.index, token, logprob))
        if sequence.drawn == sampling.max_tokens:
            places[place] = None
    return events


def _prompt_events(sequence: _Sequence, logits: Tensor) -> list[Event]:
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


def _seeds(seed: int | Sequence[int] | None, prompts: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(63)
    seeds = [seed + i for i in range(prompts)] if is_int(seed) else seed
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not all(map(is_int, seeds)):
        raise TypeError(f"generate: seed must be an int, a list of ints or None, got {seed!r}")
    if len(seeds) != prompts:
        raise ValueError(f"generate: seed must have {prompts} entries, got {len(seeds)}")
    return [value % 2**64 for value in seeds]


def _check_sampling(sampling: _Sampling, vocab: int) -> None:
    for name, minimum in (("max_tokens", 0), ("top_k", 1), ("chunk_size", 1), ("eos_id", 0)):
        value = getattr(sampling, name)
        if value is None and name != "max_tokens":
            continue
        if not is_int(value):
            raise TypeError(f"generate: {name} must be an int, got {type(value).__name__}")
        if value < minimum:
            raise ValueError(f"generate: {name} must be >= {minimum}, got {value}")
    if sampling.eos_id is not None and sampling.eos_id >= vocab:
        raise ValueError(f"generate: eos_id must be in [0, {vocab}), got {sampling.eos_id}")
    if not isinstance(sampling.prompt_logprobs, bool):
        name = type(sampling.prompt_logprobs).__name__
        raise TypeError(f"generate: prompt_logprobs must be a bool, got {name}")
    for name in ("temperature", "top_p"):
        value = getattr(sampling, name)
        if not is_number(value):
            raise TypeError(f"generate: {name} must be a float, got {type(value).__name__}")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError(
            f"generate: temperature must be finite and >= 0, got {sampling.temperature}"
        )
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {sampling.top_p}")


def _check_cache(cache: KVCache, prompts: list[list[int]], max_tokens: int) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"generate: cache must be a KVCache, got {type(cache).__name__}")
    if cache.batch != len(prompts):
        raise ValueError(
            f"generate: cache must have one place for each of {len(prompts)} prompts,"
            f" got {cache.batch}"
        )
    # The last token drawn is not fed.
    cache.check_room([len(prompt) + max(max_tokens - 1, 0) for prompt in prompts])


def _check_prompts(encoded_prompts: Sequence[Sequence[int]], vocab: int) -> list[list[int]]:
    if not isinstance(encoded_prompts, Sequence):
        name = type(encoded_prompts).__name__
        raise TypeError(f"generate: encoded_prompts must be a list of lists, got {name}")
    prompts = []
    for i, prompt in enumerate(encoded_prompts):
        if isinstance(prompt, (str, bytes)) or not hasattr(prompt, "__iter__"):
            raise TypeError(
                f"generate: encoded_prompts[{i}] must be a list of token ids,"
                f" got {type(prompt).__name__}"
            )
        try:
            prompt = [operator.index(token) for token in prompt]  # numpy's integers too
        except TypeError as error:
            raise TypeError(
                f"generate: encoded_prompts[{i}] must hold ints, got {prompt}"
            ) from error
        if not prompt:
            raise ValueError(
                f"generate: encoded_prompts[{i}] must hold at least one token, got none"
            )
        for token in prompt:
            if not 0 <= token < vocab:
                raise ValueError(
                    f"generate: encoded_prompts[{i}] must hold ids in [0, {vocab}), got {token}"
                )
        prompts.append(prompt)
    return prompts
