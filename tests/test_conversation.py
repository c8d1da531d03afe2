"""A conversation draws what a fresh cache would, and feeds only what its cache does not hold.

Where an answer is to come back from its text as the tokens it was drawn as, the model has a say in
whole words only; other models draw anything, bytes and control tokens too.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from test_tokenizer import FILES
from tiny_models import random_model

from mistral_kernels import Transformer, generate
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.conversation import Conversation
from mistral_kernels.model.tokenizer import Tokenizer
from mistral_kernels.tolerance import error, fp32_limit

QUESTIONS = ["hello", "what is a bell?", "and a dog", "why", "thank you"]
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


def speaker(
    tokenizer: Tokenizer, *, words: bool, dtype: torch.dtype = torch.float32, **shape
) -> Transformer:
    """A random model for this tokenizer, which draws whole words only if `words`."""
    model = random_model(vocab=tokenizer.vocab, dtype=dtype, **shape)
    if words:
        spoken = torch.zeros(tokenizer.vocab, 1, dtype=dtype)
        spoken[[token for token in range(300, 1500) if is_word(tokenizer, token)]] = 1
        model.output.mul_(spoken)
    return model


def is_word(tokenizer: Tokenizer, token: int) -> bool:
    text = tokenizer.decode([tokenizer.bos_id, token]).strip()
    return text.isalpha() and tokenizer.encode(text, bos=False) == [token]


class Listener:
    """Notes the ids that a model is fed, and the logits of each call's last one."""

    def __init__(self, model: Transformer, monkeypatch: pytest.MonkeyPatch):
        self.ids: list[int] = []
        self.logits: list[torch.Tensor] = []
        forward = model.forward

        def listening(input_ids, seqlens, cache=None, **options):
            logits = forward(input_ids, seqlens, cache, **options)
            self.ids += input_ids.tolist()
            self.logits.append(logits[-1])
            return logits

        monkeypatch.setattr(model, "forward", listening)


def history(conversation: Conversation, question: str) -> list[int]:
    """The ids of all that was said, with the next question."""
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    messages = [*system, *conversation.messages, {"role": "user", "content": question}]
    return conversation.tokenizer.encode_chat(messages)


def assert_as_if_fresh(conversation: Conversation, question: str, max_tokens: int = 9) -> list[int]:
    """Say something, and check the answer against one on a fresh cache; returns its tokens."""
    prompt, tokenizer = history(conversation, question), conversation.tokenizer
    (expected,), _ = generate(
        [prompt], conversation.model, max_tokens=max_tokens, eos_id=tokenizer.eos_id
    )
    answer = "".join(conversation.reply(question, max_tokens=max_tokens))
    assert conversation.tokens_fed + conversation.tokens_reused == len(prompt)
    assert (answer, conversation.tokens_drawn) == (tokenizer.decode(expected), len(expected))
    return expected


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


def test_what_was_said_is_the_history(tokenizer):
    """Its turns grow with the answers, may be edited between them, and reset forgets them."""
    model = speaker(tokenizer, words=True)
    conversation = Conversation(model, tokenizer, system="Be brief.")
    assert conversation.messages == [] and conversation.system == "Be brief."
    conversation.reply("hello")
    assert conversation.messages == [], "nobody has read the answer"
    for question in QUESTIONS:
        assert_as_if_fresh(conversation, question)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 5
    assert [message["content"] for message in conversation.messages[::2]] == QUESTIONS
    del conversation.messages[2:6]
    assert_as_if_fresh(conversation, "go on")
    conversation.reset()
    assert conversation.messages == [] and conversation.system == "Be brief."
    assert_as_if_fresh(conversation, "hello")
    assert conversation.tokens_reused == 0


def test_a_turn_without_an_answer_is_not_kept(tokenizer, monkeypatch):
    model = speaker(tokenizer, words=True)
    conversation = Conversation(model, tokenizer)
    assert_as_if_fresh(conversation, "hello")
    before, prompt = list(conversation.messages), history(conversation, "why")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "eos_id", generate([prompt], model, max_tokens=1)[0][0][0])
        assert list(conversation.reply("why", max_tokens=9)) == []
    assert conversation.messages == before and conversation.finish_reason == "stop"
    assert_as_if_fresh(conversation, "thank you")


def test_a_conversation_that_outgrows_its_context(tokenizer, monkeypatch):
    model = speaker(tokenizer, words=True)
    conversation = Conversation(model, tokenizer, context=60)
    assert_as_if_fresh(conversation, "hello")
    before, long = list(conversation.messages), "bell " * 40
    heard = Listener(model, monkeypatch)
    with pytest.raises(ValueError, match=r"would reach \d+ tokens, but its context is 60"):
        conversation.reply(long)
    assert (heard.ids, conversation.messages) == ([], before)
    prompt = history(conversation, "why")
    assert "".join(conversation.reply("why", max_tokens=1000))
    # The last token drawn is not fed: the answer has one more than the cache has places left.
    assert len(prompt) + conversation.tokens_drawn == 61
    assert conversation.finish_reason == "length" and conversation.cache.lengths == [60]
    with pytest.raises(ValueError, match="context is 60"):
        conversation.reply("thank you")
    conversation.reset()
    assert_as_if_fresh(conversation, "thank you")


@pytest.mark.parametrize(("max_positions", "context"), [(None, 8192), (512, 512), (2**20, 8192)])
def test_context_defaults_to_what_the_model_says(tokenizer, max_positions, context):
    model = speaker(tokenizer, words=False, max_positions=max_positions)
    assert Conversation(model, tokenizer).context == context


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"context": 0}, ValueError, "context must be >= 1, got 0"),
        ({"context": 2.5}, TypeError, "context must be an int, got float"),
        ({"system": 5}, ValueError, r"messages\[0\]: content: expected a text, got 5"),
        ({"text": b"hello"}, ValueError, r"messages\[0\]: content: expected a text, got b'hello'"),
        ({"text": "\udce9"}, ValueError, r"messages\[0\]: content: not Unicode text"),
        ({"max_tokens": "many"}, TypeError, "max_tokens must be an int, got str"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be >= 0, got -1"),
        ({"top_p": 2.0}, ValueError, "top_p must be in"),
    ],
)
def test_bad_input(tokenizer, changes, exception, message):
    model = speaker(tokenizer, words=False)
    making = {key: changes[key] for key in ("context", "system") if key in changes}
    saying = {"text": "hello"} | {key: changes[key] for key in changes if key not in making}
    with pytest.raises(exception, match=message):
        Conversation(model, tokenizer, **making).reply(**saying)
