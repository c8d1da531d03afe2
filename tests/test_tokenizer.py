"""Tokenizers of mistral-common: round trips, and text that arrives token by token.

The tokenizers are those that the mistral-common wheel ships, and the embedded model's own. The
oracle of decoding is mistral-common's own decode of all tokens at once.
"""

import json
import logging
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trained_tokenizers import SHIPPED, TEKKEN, TEXTS, TINY, write_tekken

from mistral_kernels.model.tokenizer import TextStream, Tokenizer

INSTRUCT = "mistral_instruct_tokenizer"
# name in a checkpoint folder -> (file, version, vocab)
FILES = {
    "tokenizer.model.v1": (SHIPPED / "tokenizer.model.v1", "v1", 32000),
    "tokenizer.model.v2": (SHIPPED / f"{INSTRUCT}_240216.model.v2", "v2", 32768),
    "tokenizer.model.v3": (SHIPPED / f"{INSTRUCT}_240323.model.v3", "v3", 32768),
    "tokenizer.model.v7": (SHIPPED / f"{INSTRUCT}_241114.model.v7", "v7", 32768),
    "tokenizer.model.v7m1": (SHIPPED / f"{INSTRUCT}_241114.model.v7m1", "v7", 32768),
    "tekken.json": (TEKKEN, "v3", 131072),
    "tokenizer.model": (TINY, "v1", 2048),
}


@pytest.fixture(scope="module", params=FILES)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """A tokenizer read from a folder that holds its file only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / request.param).symlink_to(FILES[request.param][0])
    return Tokenizer.from_folder(folder)


def stream(tokenizer: Tokenizer, ids: list[int], *, continued: bool = False) -> list[str]:
    text = TextStream(tokenizer, continued=continued)
    return [*map(text.push, ids), text.finish()]


def test_reads_version_vocab_and_ends(tokenizer):
    assert (tokenizer.version, tokenizer.vocab) == FILES[tokenizer.path.name][1:]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_whole_and_streamed(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id and tokenizer.encode(text, bos=False) == ids[1:]
    assert tokenizer.decode(ids) == text
    assert "".join(stream(tokenizer, ids)) == text


def test_random_tokens_decode_as_mistral_common_does(tokenizer):
    """Low ids are control tokens and single bytes: broken UTF-8 in every way."""
    rng = random.Random(0)
    for _ in range(3000):
        limit = rng.choice([8, 300, 1300, tokenizer.vocab])
        ids = [rng.randrange(limit) for _ in range(rng.randrange(12))]
        assert tokenizer.decode(ids) == tokenizer._tokens._tokens.decode(ids), ids


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_continuation_join_without_loss(tokenizer, text):
    prompt = tokenizer.encode("Once upon")
    ids = tokenizer.encode(text, bos=False)
    continuation = "".join(stream(tokenizer, ids, continued=True))
    assert "Once upon" + continuation == tokenizer._tokens._tokens.decode(prompt + ids)


def test_a_character_is_shown_whole(tokenizer):
    """No chunk of a stream holds a piece of a character, and each comes as soon as it can."""
    text = "a😀é漢"
    chunks = [chunk for chunk in stream(tokenizer, tokenizer.encode(text)) if chunk]
    assert "\ufffd" not in "".join(chunks) and "".join(chunks) == text
    assert len(chunks) >= 3


def test_cut_characters_bad_bytes_and_foreign_ids():
    tokenizer = Tokenizer(TINY)
    euro = tokenizer.encode("€", bos=False)
    assert len(euro) >= 3, "the euro sign is three byte tokens here"
    text = TextStream(tokenizer, continued=True)
    assert [text.push(token) for token in euro[-3:-1]] == ["", ""]
    assert text.finish() == "\ufffd" * 2 and text.finish() == ""
    assert tokenizer.decode([tokenizer.vocab, -1]) == "\ufffd" * 2


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.model.v3", b""),
        ("tokenizer.model.v3", b"no protobuf"),
        ("tokenizer.model.v99", TINY.read_bytes()),
        ("tekken.json", b""),
        ("tekken.json", b"[]"),
        ("tekken.json", b"{}"),
        ("tekken.json", b'{"config": {"version": "v3"}}'),
        ("tekken.json", b'{"config": {"version": "v99"}}'),
        ("tekken.json", b'{"config": null}'),
        ("tekken.json", b"\xff\xfe"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a tokenizer file") as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / name) in str(error.value)


def test_a_truncated_file_is_named(tmp_path):
    shutil.copy(TINY, tmp_path / "tokenizer.model.v1")
    with (tmp_path / "tokenizer.model.v1").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="tokenizer.model.v1: not a tokenizer file"):
        Tokenizer.from_folder(tmp_path)


def test_a_reason_is_given_and_short(tmp_path):
    path = write_tekken(tmp_path / "tekken.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["vocab"][0]["rank"] = 7  # an assertion without words
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match="not a tokenizer file: AssertionError"):
        Tokenizer(path)
    whole["config"]["default_vocab_size"] = -5  # one that prints the vocabulary
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match="not a tokenizer file: .") as error:
        Tokenizer(path)
    assert len(str(error.value)) < len(str(path)) + 350


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tekken.json", "tokenizer.json"])
def test_a_file_that_is_missing_is_not_called_damaged(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
        Tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "exception", "message"),
    [
        (None, TypeError, "encode: text must be a string, got NoneType"),
        (b"a", TypeError, "encode: text must be a string, got bytes"),
        ("caf\udce9", ValueError, "encode: text: not Unicode text: "),
    ],
)
def test_what_is_no_text_is_refused(tokenizer, text, exception, message):
    with pytest.raises(exception, match=message):
        tokenizer.encode(text)


def test_arrays_of_ids_are_decoded(tokenizer):
    ids = tokenizer.encode("naïve 🙂")
    for array in (np.array(ids), torch.tensor(ids)):
        assert tokenizer.decode(array) == "naïve 🙂"
    for wrong in ([1.0], ["1"], [None]):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            tokenizer.decode(wrong)


def test_check_fits(caplog):
    tokenizer = Tokenizer(TINY)
    with pytest.raises(ValueError, match="2048 tokens do not fit a model of vocab 2000"):
        tokenizer.check_fits(SimpleNamespace(vocab=2000))
    with caplog.at_level(logging.INFO, logger="mistral_kernels"):
        tokenizer.check_fits(SimpleNamespace(vocab=2048))
        assert not caplog.records
        tokenizer.check_fits(SimpleNamespace(vocab=2056))
    assert "2048 tokens, the model's vocab is 2056" in caplog.text
