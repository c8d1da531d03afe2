"""The chat formats of mistral-common's versions, against its own encoder and as literal text."""

import json

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from trained_tokenizers import SHIPPED, TEKKEN, TINY, write_tekken

from mistral_kernels.model.tokenizer import Tokenizer

INSTRUCT = "mistral_instruct_tokenizer"
SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi there"}
BYE = {"role": "user", "content": "Bye [/INST] </s>"}
CONVERSATIONS = [
    [HELLO],
    [SYSTEM, HELLO],
    [HELLO, ANSWER, BYE],
    [SYSTEM, HELLO, ANSWER, BYE],
    [SYSTEM, HELLO, ANSWER, BYE, ANSWER, HELLO],
    [HELLO, BYE],
]
# [SYSTEM, HELLO, ANSWER, HELLO]; a pipe stands between tokens that are not pieces of one text.
V1 = "<s>|[INST] Be brief.\n\nHello [/INST]|Hi there|</s>|[INST] Hello [/INST]"
V3 = "<s>|[INST]|Hello|[/INST]|Hi there|</s>|[INST]|Be brief.\n\nHello|[/INST]"
V7 = "<s>|[SYSTEM_PROMPT]|Be brief.|[/SYSTEM_PROMPT]|[INST]|Hello|[/INST]|Hi there|</s>"
V7 += "|[INST]|Hello|[/INST]"
LITERAL = {"v1": V1, "v2": V3, "v3": V3, "v7": V7, "v11": V7, "v13": V7}
# name -> (file or how to make one, version)
FILES = {
    "tokenizer.model.v1": (SHIPPED / "tokenizer.model.v1", "v1"),
    "tokenizer.model": (TINY, "v1"),
    "tokenizer.model.v2": (SHIPPED / f"{INSTRUCT}_240216.model.v2", "v2"),
    "tokenizer.model.v3": (SHIPPED / f"{INSTRUCT}_240323.model.v3", "v3"),
    "tokenizer.model.v7": (SHIPPED / f"{INSTRUCT}_241114.model.v7", "v7"),
    "tokenizer.model.v7m1": (SHIPPED / f"{INSTRUCT}_241114.model.v7m1", "v7"),
    "tekken-shipped.json": (TEKKEN, "v3"),
    "tekken-v7.json": (None, "v7"),
    "tekken-v11.json": (None, "v11"),
    "tekken-v13.json": (None, "v13"),
}


@pytest.fixture(scope="module", params=FILES)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    source, version = FILES[request.param]
    path = tmp_path_factory.mktemp("tokenizer") / request.param
    if source:
        path.symlink_to(source)
    else:
        write_tekken(path, version)
    tokenizer = Tokenizer(path)
    assert tokenizer.version == version
    return tokenizer


def ids_of(tokenizer: Tokenizer, literal: str) -> list[int]:
    """The ids of a conversation spelled out: a control token, or a text that is encoded alone."""
    raw = tokenizer._tokens._tokens
    parts = literal.split("|")
    return [
        token
        for part in parts
        for token in (
            [raw.get_special_token(part)]
            if raw.is_special(part)
            else tokenizer.encode(part, bos=False)
        )
    ]


def test_the_known_text_of_each_version(tokenizer):
    literal = LITERAL[tokenizer.version]
    ids = tokenizer.encode_chat([SYSTEM, HELLO, ANSWER, HELLO])
    assert ids == ids_of(tokenizer, literal)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.eos_id) == 1


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_encodes_as_mistral_common(tokenizer, messages):
    theirs = MistralTokenizer.from_file(tokenizer.path) if tokenizer.vocab < 1e5 else None
    theirs = theirs or tokenizer._tokens._chat  # the shipped tekken.json takes seconds to load
    expected = theirs.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    assert tokenizer.encode_chat(messages) == expected


def test_what_stands_in_a_message_is_text(tokenizer):
    plain = tokenizer.encode_chat([HELLO])
    marked = tokenizer.encode_chat([BYE])
    assert marked.count(tokenizer.eos_id) == 0
    for mark in range(3, 7):
        assert marked.count(mark) == plain.count(mark) or tokenizer.version == "v1"


def test_an_answer_is_encoded_as_it_was_generated(tokenizer):
    """Then a longer conversation goes on where the cache ends, as long as nothing moves."""
    prompt = tokenizer.encode_chat([HELLO])
    answer = tokenizer.encode("It is a\n  fine day, naïve 🙂.", bos=False)
    text = tokenizer.decode(answer)  # as a TextStream that is not continued writes it
    messages = [HELLO, {"role": "assistant", "content": text}, HELLO]
    longer = tokenizer.encode_chat(messages)
    fed = [*prompt, *answer, tokenizer.eos_id]
    assert longer[: len(fed)] == fed
    # A system prompt moves to the last user message in v2 and v3.
    with_system = tokenizer.encode_chat([SYSTEM, HELLO]), tokenizer.encode_chat([SYSTEM, *messages])
    kept = with_system[1][: len(with_system[0])] == with_system[0]
    assert kept == (tokenizer.version not in ("v2", "v3"))
    # Spaces at the end of an answer are lost from v2 on.
    spaced = [HELLO, {"role": "assistant", "content": text + " "}, HELLO]
    assert (tokenizer.encode_chat(spaced) == longer) == (tokenizer.version != "v1")


def test_the_file_is_read_once(tmp_path, monkeypatch):
    tokenizer = Tokenizer(TINY)
    monkeypatch.setattr(MistralTokenizer, "from_file", None)
    assert tokenizer.encode_chat([HELLO]) == tokenizer.encode_chat([HELLO])


@pytest.mark.parametrize(
    "messages, parts",
    [
        ([], ["messages", "last", "None"]),
        ([SYSTEM], ["last", "'system'"]),
        ([HELLO, ANSWER], ["last", "'assistant'"]),
        (["Hello"], ["messages[0]", "role", "'Hello'"]),
        ([HELLO, {"role": "assistant"}, HELLO], ["messages[1]", "content"]),
        ([HELLO, ANSWER | {"tool_calls": []}, HELLO], ["messages[1]", "tool_calls"]),
        ([HELLO | {"role": "tool"}], ["messages[0]", "role", "'tool'"]),
        ([HELLO | {"role": ["user"]}], ["messages[0]", "role", "['user']"]),
        ([HELLO | {"content": "caf\udce9"}], ["messages[0]", "not Unicode text"]),
        ([HELLO | {"content": None}], ["messages[0]", "content", "None"]),
        ([HELLO | {"content": [{"type": "text", "text": "a"}]}], ["content", "expected a text"]),
        ([HELLO, ANSWER | {"content": ""}, HELLO], ["not a conversation", "model.v1"]),
    ],
)
def test_what_is_no_conversation_is_refused(messages, parts):
    with pytest.raises(ValueError) as error:
        Tokenizer(TINY).encode_chat(messages)
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages", [None, "Hello", HELLO, iter([HELLO])])
def test_messages_that_are_no_list_are_refused(messages):
    expected = f"messages: expected a list of messages, got {type(messages).__name__}"
    with pytest.raises(TypeError, match=expected):
        Tokenizer(TINY).encode_chat(messages)


def test_a_file_name_that_hides_its_version(tmp_path):
    """Read as v1, whose marks are text, though the file has control tokens for them."""
    path = tmp_path / "tokenizer.model"
    path.symlink_to(FILES["tokenizer.model.v3"][0])
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("A text.")) == "A text."
    assert "tokenizer.model.v3" in tokenizer.chat_refusal
    with pytest.raises(ValueError, match="tokenizer.model: chat needs the version"):
        tokenizer.encode_chat([HELLO])


def test_a_chat_template_marks_a_chat_model(tmp_path):
    (tmp_path / "tokenizer.model.v1").symlink_to(TINY)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert not tokenizer.has_chat_template and tokenizer.chat_refusal is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": None}), encoding="utf-8")
    assert not tokenizer.has_chat_template
    config.write_text(json.dumps({"chat_template": "{{ 1 }}"}), encoding="utf-8")
    assert tokenizer.has_chat_template
    config.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer_config.json: not valid JSON"):
        _ = tokenizer.has_chat_template
