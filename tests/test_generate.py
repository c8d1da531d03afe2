"""generate and stream: what they return does not depend on how the work was cut up."""

import re

import numpy as np
import pytest
import torch
from tiny_models import feed, random_model, random_prompts

from mistral_kernels import generate, stream
from mistral_kernels.model import prompt_chunks

WINDOWS = (5, None)
PROMPTS = random_prompts([3, 17, 1, 8])


@pytest.fixture(scope="module")
def model():
    return random_model(windows=WINDOWS, max_batch_size=4)


def rescored(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logprobs of all tokens but the first, from one forward call without a cache."""
    row = prompt + tokens
    logits = feed(model, None, [row], [len(row)])[0][:-1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0]


def test_greedy_logprobs_are_those_of_a_fresh_forward(model):
    tokens, logprobs = generate(PROMPTS, model, max_tokens=12)
    for prompt, row, scores in zip(PROMPTS, tokens, logprobs, strict=True):
        assert len(row) == len(scores) == 12
        expected = rescored(model, prompt, row)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(scores).double(), expected)
        logits = feed(model, None, [prompt + row], [len(prompt) + 12])[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == row


def test_prompt_logprobs_come_in_front(model):
    for chunk_size in (None, 4):
        tokens, logprobs = generate(
            PROMPTS, model, max_tokens=5, prompt_logprobs=True, chunk_size=chunk_size
        )
        assert tokens == generate(PROMPTS, model, max_tokens=5)[0]
        for prompt, row, scores in zip(PROMPTS, tokens, logprobs, strict=True):
            expected = rescored(model, prompt, row)
            torch.testing.assert_close(torch.tensor(scores).double(), expected)


def test_scoring_a_prompt_alone(model):
    tokens, logprobs = generate(PROMPTS[1:2], model, max_tokens=0, prompt_logprobs=True)
    assert tokens == [[]] and len(logprobs[0]) == len(PROMPTS[1]) - 1
    assert generate(PROMPTS, model, max_tokens=0) == ([[]] * 4, [[]] * 4)


def test_a_cache_is_continued(model):
    whole, _ = generate(PROMPTS, model, max_tokens=12)
    cache = model.new_cache(4, 40)
    first, _ = generate(PROMPTS, model, max_tokens=5, cache=cache)
    assert cache.lengths == [len(prompt) + 4 for prompt in PROMPTS]
    rest, _ = generate([row[-1:] for row in first], model, max_tokens=7, cache=cache)
    assert [a + b for a, b in zip(first, rest, strict=True)] == whole


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_fed(model):
    cache = model.new_cache(1, 8)
    with pytest.raises(ValueError, match="one place for each of 2 prompts, got 1"):
        generate([[1], [2]], model, max_tokens=1, cache=cache)
    with pytest.raises(ValueError, match="generate: cache: sequence 0 would reach 9 tokens"):
        generate([[1, 2, 3]], model, max_tokens=7, cache=cache)
    with pytest.raises(TypeError, match="generate: cache must be a KVCache"):
        generate([[1]], model, max_tokens=1, cache="ring")
    other = random_model(windows=(7, None)).new_cache(1, 8)
    with pytest.raises(ValueError, match="generate: cache must come from this model's new_cache"):
        stream([[1]], model, max_tokens=1, cache=other)
    assert cache.lengths == [0]
    assert len(generate([[1, 2, 3]], model, max_tokens=6, cache=cache)[0][0]) == 6


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 6, 16, 100])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chunk_size_changes_nothing(model, chunk_size, temperature):
    options = {"max_tokens": 9, "temperature": temperature, "seed": 3}
    whole = generate(PROMPTS, model, **options)
    chunked = generate(PROMPTS, model, **options, chunk_size=chunk_size)
    assert chunked[0] == whole[0]
    for a, b in zip(chunked[1], whole[1], strict=True):
        assert a == pytest.approx(b, abs=1e-10)


def test_prompts_longer_than_a_step_takes_are_cut(model, monkeypatch):
    expected = generate(PROMPTS, model, max_tokens=6, chunk_size=3)
    fed, forward = [], model.run
    monkeypatch.setitem(prompt_chunks.MOST_TOKENS, "cpu", 12)
    monkeypatch.setattr(prompt_chunks, "WHOLE_TILES", 1)

    def run(input_ids, *rest, **options):
        fed.append(len(input_ids))
        return forward(input_ids, *rest, **options)

    monkeypatch.setattr(model, "run", run)
    tokens, logprobs = generate(PROMPTS, model, max_tokens=6)
    assert fed == [12, 12, 10, 4, 4, 4, 2, 1]  # 3 + 4 + 1 + 4, 1 + 6 + 1 + 4, 1 + 7 + 1 + 1
    assert tokens == expected[0]
    for a, b in zip(logprobs, expected[1], strict=True):
        assert a == pytest.approx(b, abs=1e-10)


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 4])
def test_a_sequence_does_not_depend_on_its_batch(max_batch_size):
    model = random_model(windows=WINDOWS, max_batch_size=max_batch_size)
    options = {"max_tokens": 9, "temperature": 1.1, "top_p": 0.9, "top_k": 20}
    together = generate(PROMPTS, model, **options, seed=5)[0]
    alone = [
        generate([prompt], model, **options, seed=5 + i)[0][0] for i, prompt in enumerate(PROMPTS)
    ]
    listed = generate(PROMPTS[::-1], model, **options, seed=[8, 7, 6, 5])[0][::-1]
    assert together == alone == listed
    assert together != generate(PROMPTS, model, **options, seed=6)[0]


def test_no_seed_draws_anew(model):
    options = {"max_tokens": 20, "temperature": 1.5}
    assert generate(PROMPTS, model, **options)[0] != generate(PROMPTS, model, **options)[0]


def test_eos_ends_a_sequence_and_is_not_returned(model):
    free, scores = generate(PROMPTS, model, max_tokens=12)
    eos_id = free[1][4]
    tokens, logprobs = generate(PROMPTS, model, max_tokens=12, eos_id=eos_id)
    for got, got_scores, row, row_scores in zip(tokens, logprobs, free, scores, strict=True):
        end = row.index(eos_id) if eos_id in row else 12
        assert got == row[:end]
        assert got_scores == pytest.approx(row_scores[:end], abs=1e-10)
    assert len(tokens[1]) <= 4


def test_stream_yields_what_generate_returns_as_it_is_drawn(model):
    options = {"max_tokens": 6, "temperature": 0.7, "seed": 1, "chunk_size": 4}
    events = list(stream(PROMPTS, model, **options))
    tokens, logprobs = generate(PROMPTS, model, **options)
    for i in range(len(PROMPTS)):
        assert [token for sequence, token, _ in events if sequence == i] == tokens[i]
        assert [logprob for sequence, _, logprob in events if sequence == i] == logprobs[i]
    # The prompt of one token draws long before the one of 17 has been fed.
    assert events[0][0] in (0, 2) and [e[0] for e in events].index(1) > 4


@pytest.mark.parametrize("form", [np.array, torch.tensor, tuple, lambda ids: [*np.array(ids)]])
def test_ids_in_other_forms_are_taken(model, form):
    prompts = [form(prompt) for prompt in PROMPTS]
    assert generate(prompts, model, max_tokens=3) == generate(PROMPTS, model, max_tokens=3)


def test_many_windows_of_decode(model):
    (prompt,) = random_prompts([4])
    tokens, logprobs = generate([prompt], model, max_tokens=60)
    expected = rescored(model, prompt, tokens[0])[3:]
    torch.testing.assert_close(torch.tensor(logprobs[0]).double(), expected)


def test_logits_that_are_not_finite_are_reported():
    broken = random_model(windows=WINDOWS)
    broken.norm[3] = torch.nan
    with pytest.raises(RuntimeError, match="logits of sequence 0 are not finite"):
        generate([[1, 2]], broken, max_tokens=2)


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"encoded_prompts": [[1], []]}, ValueError, "encoded_prompts[1] must hold at least one"),
        ({"encoded_prompts": [[1, 32]]}, ValueError, "ids in [0, 32), got 32"),
        ({"encoded_prompts": [[-1]]}, ValueError, "ids in [0, 32), got -1"),
        ({"encoded_prompts": [[1.5]]}, TypeError, "must hold ints, got [1.5]"),
        ({"encoded_prompts": [[1, True]]}, TypeError, "must hold ints, got bools: [1, True]"),
        ({"encoded_prompts": [np.array([[1], [2]])]}, TypeError, "must hold ints, got array([[1]"),
        ({"encoded_prompts": [{1, 2}]}, TypeError, "or a list of token ids, got set"),
        ({"encoded_prompts": [{1: 2}]}, TypeError, "or a list of token ids, got dict"),
        ({"encoded_prompts": 5}, TypeError, "encoded_prompts must be a list of prompts, got int"),
        ({"prompt_logprobs": 3}, TypeError, "prompt_logprobs must be a bool, got int"),
        ({"encoded_prompts": [1, 2]}, TypeError, "encoded_prompts[0] must be a string or a list"),
        (
            {"encoded_prompts": "text"},
            TypeError,
            "a list of prompts, got one str: put it",
        ),
        (
            {"encoded_prompts": [b"text"]},
            TypeError,
            "encoded_prompts[0] must be a string or a list of token ids",
        ),
        (
            {"encoded_prompts": ["text"]},
            ValueError,
            "encoded_prompts[0] needs the model's tokenizer: ",
        ),
        ({"stop": "\n"}, ValueError, "stop needs the model's tokenizer: Transformer: a model that"),
        ({"stop": ["a", ""]}, ValueError, "stop must not hold an empty string, got ['a', '']"),
        ({"stop": 5}, TypeError, "stop must be a string or a list of strings, got 5"),
        ({"cancel": True}, TypeError, "cancel must be a threading.Event, got bool"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be >= 0, got -1"),
        ({"max_tokens": 2.0}, TypeError, "max_tokens must be an int, got float"),
        ({"max_tokens": None}, TypeError, "max_tokens must be an int, got NoneType"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and >= 0, got -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite and >= 0, got nan"),
        ({"temperature": 10**400}, ValueError, "temperature must be finite and >= 0, got 1000"),
        ({"temperature": "hot"}, TypeError, "temperature must be a float, got str"),
        ({"top_p": 0.0}, ValueError, "top_p must be in (0, 1], got 0.0"),
        ({"top_p": 1.1}, ValueError, "top_p must be in (0, 1], got 1.1"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1, got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1, got 0"),
        ({"eos_id": -1}, ValueError, "eos_id must be >= 0, got -1"),
        ({"eos_id": 32}, ValueError, "eos_id must be in [0, 32), got 32"),
        ({"seed": [1, 2]}, ValueError, "seed must have 1 entries, got 2"),
        ({"seed": "x"}, TypeError, "seed must be an int, a list of ints or None, got 'x'"),
        ({"seed": 1.0}, TypeError, "seed must be an int, a list of ints or None, got 1.0"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_input(model, function, changes, exception, message):
    arguments = {"encoded_prompts": [[1, 2]], "max_tokens": 1} | changes
    with pytest.raises(exception, match=re.escape(message)):
        function(arguments.pop("encoded_prompts"), model, **arguments)


@pytest.mark.parametrize("function", [generate, stream])
def test_arguments_in_the_wrong_order(model, function):
    with pytest.raises(TypeError, match="generate: model must be a Transformer, got list"):
        function(model, PROMPTS, max_tokens=1)
