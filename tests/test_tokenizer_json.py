"""tokenizer.json: ids and text as transformers has them, one token at a time.

The oracle is PreTrainedTokenizerFast on the same folder. The SentencePiece forms are conversions of
the embedded tokenizer.model, so mistral-common on that file is a second one.
"""

import random

import pytest
from command_line import generate_json
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from trained_tokenizers import (
    CONTROL,
    TEXTS,
    TINY,
    byte_level,
    sentencepiece_form,
    write_folder,
    write_tekken,
)
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter

from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model import tokenizer as ours
from mistral_kernels.model.tokenizer import TextStream

FORMS = {
    "byte-level": byte_level,
    "metaspace": sentencepiece_form,
    "prepend": lambda: sentencepiece_form("prepend"),
}


@pytest.fixture(scope="module", params=FORMS)
def folder(request, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp(request.param), FORMS[request.param]())


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ours.Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder, split_special_tokens=True)


def stream(tokenizer, ids, *, continued=False):
    text = TextStream(tokenizer, continued=continued)
    return [*map(text.push, ids), text.finish()]


@pytest.mark.parametrize("text", [*TEXTS, "", " ", "a", " a", "  a"])
def test_encodes_and_decodes_as_transformers(tokenizer, theirs, text):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text)
    assert tokenizer.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False)
    decoded = theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == "".join(stream(tokenizer, ids)) == decoded
    # Metaspace adds no space before a text that has one, and the decoder drops that one.
    lossy = "Metaspace" in repr(theirs.backend_tokenizer.pre_tokenizer) and text.startswith(" ")
    assert decoded == (text[1:] if lossy else text)


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_continuation_join_without_loss(tokenizer, theirs, text):
    prompt, ids = tokenizer.encode("Once upon"), tokenizer.encode(text, bos=False)
    continuation = "".join(stream(tokenizer, ids, continued=True))
    whole = theirs.decode(prompt + ids, skip_special_tokens=True)
    assert tokenizer.decode(prompt) + continuation == whole


def test_random_tokens_decode_as_transformers_does(tokenizer, theirs):
    """Bad UTF-8 apart, of which byte fallback spoils a whole run, and control tokens apart."""
    rng, compared = random.Random(0), 0
    silent = {token for token in range(tokenizer.vocab) if not tokenizer.decode([token])}
    for _ in range(3000):
        limit = rng.choice([8, 300, 400, tokenizer.vocab])
        ids = [rng.randrange(limit) for _ in range(rng.randrange(6))]
        ids = [token for token in ids if token not in silent]
        text = theirs.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in text:
            compared += 1
            assert tokenizer.decode(ids) == text, ids
    assert compared > 500


@pytest.mark.parametrize("text", [text for text in TEXTS if "</s>" not in text])
def test_a_converted_sentencepiece_file_encodes_as_the_original(text):
    original = ours.Tokenizer(TINY).encode(text, bos=False)
    for form in ("prepend", "metaspace")[: 1 if text.startswith(" ") else 2]:
        assert sentencepiece_form(form).encode(text, add_special_tokens=False).ids == original


def test_a_converted_tekken_file_is_the_original(tmp_path):
    tekken = ours.Tokenizer(write_tekken(tmp_path / "tekken.json"))
    backend = MistralConverter(str(tekken.path)).converted()
    converted = ours.Tokenizer.from_folder(write_folder(tmp_path / "converted", backend))
    assert converted.kind == "tokenizers" and converted.vocab == tekken.vocab == 3000
    assert (converted.bos_id, converted.eos_id) == (tekken.bos_id, tekken.eos_id)
    for text in TEXTS:
        ids = tekken.encode(text, bos=False)
        assert converted.encode(text, bos=False) == ids
        assert converted.decode(ids) == text
    rng = random.Random(0)
    for _ in range(1000):
        ids = [rng.randrange(1300) for _ in range(rng.randrange(12))]
        assert converted.decode(ids) == tekken.decode(ids)


def test_a_character_is_shown_whole_and_control_tokens_are_silent(tokenizer):
    text = "a😀é漢"
    chunks = [chunk for chunk in stream(tokenizer, tokenizer.encode(text)) if chunk]
    assert "\ufffd" not in "".join(chunks) and "".join(chunks) == text and len(chunks) >= 3
    begun = stream(tokenizer, [*tokenizer.encode("漢", bos=False)[:-1], tokenizer.eos_id])
    assert set(begun[-2]) == {"\ufffd"} and begun[-1] == ""
    assert tokenizer.decode([tokenizer.vocab, -1]) == "\ufffd" * 2
    # A control token spelled out is text.
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "a</s>b"


def test_added_tokens_show_if_they_are_no_control_tokens(tmp_path):
    backend = byte_level()
    backend.add_tokens([AddedToken("<tool▁call>", normalized=False)])
    tokenizer = ours.Tokenizer.from_folder(write_folder(tmp_path, backend))
    ids = tokenizer.encode("a <tool▁call> b", bos=False)
    assert tokenizer.vocab - 1 in ids and tokenizer.decode(ids) == "a <tool▁call> b"


def test_what_training_left_in_the_file_is_not_done(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    tokenizer = ours.Tokenizer.from_folder(write_folder(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.Metaspace("▁", "never")])
def test_other_decoders(tmp_path, decoder):
    backend = sentencepiece_form()
    backend.decoder = decoder
    tokenizer = ours.Tokenizer.from_folder(write_folder(tmp_path, backend))
    for ids in (tokenizer.encode("quick brown", bos=False), tokenizer.encode("  fox", bos=False)):
        assert tokenizer.decode(ids) == backend.decode(ids)
        both = backend.decode([*tokenizer.encode("a", bos=False), *ids])
        first = backend.decode(tokenizer.encode("a", bos=False))
        assert first + "".join(stream(tokenizer, ids, continued=True)) == both


def test_tokens_without_a_decoder_are_words(tmp_path):
    backend = Backend(WordLevel({"<unk>": 0, "quick": 1, "brown": 2, "fox": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ours.Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("quick  red fox")
    assert ids == [1, 0, 3]
    assert tokenizer.decode(ids) == backend.decode(ids) == "quick <unk> fox"
    assert stream(tokenizer, [2, 3], continued=True) == [" brown", " fox", ""]


def test_control_tokens_are_those_of_the_file(tokenizer):
    assert [tokenizer.decode([token]) for token in range(3)] == [""] * 3
    assert len(CONTROL) == sum(map(tokenizer._tokens.is_control, range(tokenizer.vocab)))


def test_generates_as_with_the_original_file(tmp_path):
    for name in ("params.json", "consolidated.safetensors"):
        (tmp_path / name).symlink_to(TINY_MIXTRAL / name)
    write_folder(tmp_path, sentencepiece_form(control=CONTROL[:3]))
    arguments = ("--prompt", "whistle:", "--max-tokens", "30")
    converted, original = generate_json(tmp_path, *arguments), generate_json(*arguments)
    assert converted["tokens"] == original["tokens"] and converted["text"] == original["text"]
