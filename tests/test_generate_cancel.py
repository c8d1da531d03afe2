"""Generation that is watched and ends early: cancelled, closed, or by an exception."""

import signal
import threading

import pytest
from tiny_models import random_model, random_prompts

from mistral_kernels import generate, stream

PROMPTS = random_prompts([3, 17, 1])
ENDLESS = 20_000


@pytest.fixture(scope="module")
def model():
    return random_model(windows=(5, None), max_batch_size=2)


@pytest.mark.parametrize("prompt_logprobs", [False, True])
def test_on_token_sees_what_stream_yields(model, prompt_logprobs):
    options = {"max_tokens": 6, "temperature": 0.7, "seed": 1, "prompt_logprobs": prompt_logprobs}
    events = []
    result = generate(PROMPTS, model, **options, on_token=lambda *event: events.append(event))
    assert events == list(stream(PROMPTS, model, **options))
    assert result == generate(PROMPTS, model, **options)


def test_on_token_must_be_callable(model):
    with pytest.raises(TypeError, match="generate: on_token must be callable, got int"):
        generate(PROMPTS, model, max_tokens=1, on_token=5)


def test_cancel_by_on_token_returns_what_was_drawn(model):
    whole, scores = generate(PROMPTS[:2], model, max_tokens=9)
    cancel, events = threading.Event(), []

    def on_token(*event) -> None:
        events.append(event)
        if len(events) == 7:
            cancel.set()

    tokens, logprobs = generate(PROMPTS[:2], model, max_tokens=9, on_token=on_token, cancel=cancel)
    # The step of the seventh token drew the eighth too.
    assert tokens == [row[:4] for row in whole] and logprobs == [row[:4] for row in scores]


def test_cancel_before_the_first_step(model):
    cancel = threading.Event()
    cancel.set()
    assert generate(PROMPTS, model, max_tokens=4, cancel=cancel) == ([[]] * 3, [[]] * 3)
    assert list(stream(PROMPTS, model, max_tokens=4, cancel=cancel)) == []


def test_cancel_between_the_chunks_of_a_prompt(model):
    cancel, cache = threading.Event(), model.new_cache(2, 40)
    prompts = PROMPTS[1:]  # of 17 and of 1 token, the latter draws with the first chunk
    tokens, _ = generate(
        prompts,
        model,
        max_tokens=9,
        chunk_size=6,
        cache=cache,
        cancel=cancel,
        on_token=lambda *event: cancel.set(),
    )
    assert tokens == [[], generate(prompts[1:], model, max_tokens=1)[0][0]]
    assert cache.lengths == [6, 1]
    rest, _ = generate([prompts[0][6:], tokens[1]], model, max_tokens=5, cache=cache)
    whole, _ = generate(prompts, model, max_tokens=6)
    assert [rest[0], tokens[1] + rest[1]] == [whole[0][:5], whole[1]]


def test_cancel_by_another_thread(model):
    begun, cancel = threading.Event(), threading.Event()

    def cancel_once_begun() -> None:
        begun.wait(60)
        cancel.set()

    thread = threading.Thread(target=cancel_once_begun)
    thread.start()
    (tokens,), _ = generate(
        [[1]], model, max_tokens=ENDLESS, cancel=cancel, on_token=lambda *event: begun.set()
    )
    thread.join(60)
    assert 1 <= len(tokens) < ENDLESS
    assert tokens == generate([[1]], model, max_tokens=len(tokens))[0][0]


def test_cancel_by_a_signal_handler(model):
    cancel = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: cancel.set())
    try:
        events = []
        for event in stream([[1]], model, max_tokens=ENDLESS, cancel=cancel):
            events.append(event)
            if len(events) == 5:
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(events) == 5


def ended_early(how: str, model, cache) -> list[int]:
    """The tokens drawn until generation on PROMPTS[0] was ended at the fourth."""
    drawn = []

    def on_token(sequence: int, token: int, logprob: float) -> None:
        drawn.append(token)
        if len(drawn) == 4 and how == "error":
            raise LookupError("of the caller")
        if len(drawn) == 4 and how == "signal":
            signal.raise_signal(signal.SIGINT)

    if how == "close":
        events = stream(PROMPTS[:1], model, max_tokens=9, cache=cache)
        drawn = [next(events)[1] for _ in range(4)]
        events.close()
        assert list(events) == []
    else:
        with pytest.raises({"error": LookupError, "signal": KeyboardInterrupt}[how]):
            generate(PROMPTS[:1], model, max_tokens=9, cache=cache, on_token=on_token)
    return drawn


@pytest.mark.parametrize("how", ["error", "signal", "close"])
def test_a_cache_goes_on_after_an_early_end(model, how):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored
    try:
        cache = model.new_cache(1, 40)
        first = ended_early(how, model, cache)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(first) == 4 and cache.lengths == [len(PROMPTS[0]) + 3]
    rest, _ = generate([first[-1:]], model, max_tokens=5, cache=cache)
    assert [first + rest[0]] == generate(PROMPTS[:1], model, max_tokens=9)[0]
