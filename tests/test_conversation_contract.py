"""What a conversation keeps and refuses: its history, its context, its arguments."""

import pytest
from speaker import QUESTIONS, Listener, assert_as_if_fresh, history, speaker

from mistral_kernels import generate
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.conversation import Conversation
from mistral_kernels.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY_MIXTRAL)


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
        ({"context": 17}, ValueError, "context must be >= 18, .* got 17"),
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
