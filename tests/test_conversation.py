"""A conversation draws what a fresh cache would, and feeds only what its cache does not hold."""

import os
from collections.abc import Iterator

import pytest
import torch
from speaker import QUESTIONS, Listener, assert_as_if_fresh, history, speaker
from test_tokenizer import FILES

from mistral_kernels import generate
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.conversation import Conversation
from mistral_kernels.model.tokenizer import Tokenizer
from mistral_kernels.tolerance import error, fp32_limit

# Windows that reach from an answer back over the question, which has 16 tokens of marks, into the
# turn before: a key that is not what it should be shows.
SHAPES = {
    "full attention": {"windows": (None, None)},
    "windowed": {"windows": (24, 24)},
    "mixed windows": {"windows": (None, 20)},
    "Mixtral": {"windows": (24, 24), "experts": 4, "top_k": 2},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY_MIXTRAL)


@shapes
def test_turns_equal_a_fresh_cache_and_feed_only_what_is_new(tokenizer, shape, monkeypatch):
    model = speaker(tokenizer, words=True, **shape)
    exact = speaker(tokenizer, words=True, dtype=torch.float64, **shape)
    conversation = Conversation(model, tokenizer, context=400, lookahead=0)
    for turn, question in enumerate(QUESTIONS * 2):
        prompt, held = history(conversation, question), conversation.cache.lengths[0]
        fed = drawn = generate([prompt], model, max_tokens=9)[0][0]
        with monkeypatch.context() as patch:
            heard = Listener(model, patch)
            if turn % 2:  # a word that ends the answer is neither said nor fed
                end = next(token for token in drawn if token != drawn[0])
                patch.setattr(tokenizer, "eos_id", end)
                fed = drawn = drawn[: drawn.index(end)]
            else:  # max_tokens end it: the last word is said, but not fed
                fed = drawn[:-1]
            answer = "".join(conversation.reply(question, max_tokens=9))
        assert answer and answer == tokenizer.decode(drawn)
        assert conversation.finish_reason == ("stop" if turn % 2 else "length")
        assert heard.ids == prompt[held:] + fed
        assert (conversation.tokens_reused, conversation.tokens_fed) == (held, len(prompt) - held)
        whole = prompt + fed
        logits = exact.forward(torch.tensor(whole), [len(whole)])[len(prompt) - 1 :]
        assert error(torch.stack(heard.logits), logits).within(fp32_limit("cpu"))
    rings = [layer for layer in conversation.cache.layers if layer.window]
    assert all(conversation.cache.lengths[0] > 4 * layer.capacity for layer in rings)


def turns(conversation: Conversation, max_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Each turn after the first, checked: tokens held before, how many of them fit, and reused."""
    known: list[int] = []
    for question in QUESTIONS:
        prompt, held = history(conversation, question), conversation.cache.lengths[0]
        fitting = len(os.path.commonprefix([known[:held], prompt]))
        known = prompt + assert_as_if_fresh(conversation, question, max_tokens)
        if held:
            yield held, fitting, conversation.tokens_reused


@pytest.mark.parametrize(
    ("windows", "lookahead", "keeps"),
    [((None, None), 0, True), ((24, 24), 64, True), ((24, 24), 0, False), ((None, 24), 0, False)],
)
def test_an_answer_that_encodes_to_other_tokens(tokenizer, windows, lookahead, keeps):
    """All up to the first other token stays, unless a ring has overwritten what came before it."""
    model = speaker(tokenizer, words=False, windows=windows)
    taken_back = []
    for held, fitting, reused in turns(Conversation(model, tokenizer, lookahead=lookahead), 20):
        taken_back.append(held - fitting)
        # Rings of whole pages can take back a few tokens more than they were asked to.
        assert reused == (fitting if keeps or taken_back[-1] < 9 else 0)
    assert max(taken_back) > 16


@pytest.mark.parametrize(
    ("name", "moves"), [("tokenizer.model.v3", True), ("tokenizer.model.v7", False)]
)
@pytest.mark.parametrize("windows", [(None, None), (8, 8)])
def test_a_format_that_moves_the_system_prompt(name, moves, windows):
    """v3 puts it before the last message, v7 before the first."""
    tokenizer = Tokenizer(FILES[name][0])
    model = speaker(tokenizer, words=True, windows=windows)
    conversation = Conversation(model, tokenizer, system="Be brief.", lookahead=0)
    for held, fitting, reused in turns(conversation, 9):
        assert (fitting < held) == moves
        assert reused == (0 if moves and windows[0] else fitting)


@shapes
@pytest.mark.parametrize("tokens", [1, 4])
def test_an_answer_that_is_broken_off(tokenizer, shape, tokens):
    model = speaker(tokenizer, words=True, **shape)
    conversation = Conversation(model, tokenizer)
    for question in QUESTIONS:
        answer = conversation.reply(question, max_tokens=50)
        said = "".join(next(answer) for _ in range(tokens))
        assert conversation.messages[-2:] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": said},
        ]
    held = conversation.cache.lengths[0]
    assert_as_if_fresh(conversation, "go on")
    assert conversation.tokens_reused == held
    assert list(answer) == [], "the next reply ends the one before"


class BrokenOff(Exception):
    """Stands for Ctrl-C, which may come anywhere."""


@shapes
@pytest.mark.parametrize("step", [0, 3])
def test_a_step_that_is_broken_off(tokenizer, shape, step, monkeypatch):
    """After the first layer has written its ring, while the question is read or in the answer."""
    model = speaker(tokenizer, words=True, **shape)
    conversation = Conversation(model, tokenizer, lookahead=0)
    for question in QUESTIONS:
        assert_as_if_fresh(conversation, question)
    before = list(conversation.messages)
    said, last, calls = [], model.layers[-1], iter(range(100))
    forward = last.forward

    def breaking(*arguments):
        if next(calls) == step:
            raise BrokenOff
        return forward(*arguments)

    with monkeypatch.context() as patch, pytest.raises(BrokenOff):
        patch.setattr(last, "forward", breaking)
        said.extend(conversation.reply("a long question of many tokens", max_tokens=9))
    assert conversation.messages[: len(before)] == before
    assert (len(conversation.messages) > len(before)) == (step > 0)
    held = conversation.cache.lengths[0]
    assert_as_if_fresh(conversation, "go on")
    if step > 0:  # one token overwrites nothing that is still needed
        assert conversation.tokens_reused == held
