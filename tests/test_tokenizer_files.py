"""Which tokenizer file of a folder is read, and what happens where two disagree."""

import json
import logging
from dataclasses import replace

import pytest
from trained_tokenizers import SHIPPED, TINY, byte_level, write_folder, write_tekken

from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.tokenizer import Tokenizer
from mistral_kernels.model.tokenizer_files import tokenizer_files

CONFIG = ModelConfig.from_folder(TINY_MIXTRAL)


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["tokenizer.model", "tokenizer.model.v1"], ["tokenizer.model.v1"]),
        (
            ["tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model.v2"],
            ["tokenizer.model.v3"],
        ),
        (["tokenizer.model.v7", "tokenizer.model.v7m1"], ["tokenizer.model.v7m1"]),
        (["tokenizer.model.v3", "tokenizer.model.v11"], ["tokenizer.model.v11"]),
        (["tokenizer.model.v7", "tekken.json"], ["tekken.json", "tokenizer.model.v7"]),
        (["tokenizer.model", "tokenizer.model.very-old", "tokenizer.json"], ["tokenizer.model"]),
        (["tokenizer.json", "tekken.json"], ["tekken.json"]),
        (["tokenizer.json", "tekken.json", "chat_template.jinja"], ["tekken.json"]),
        (["tokenizer.json"], ["tokenizer.json"]),
        (["tokenizer.json", "chat_template.jinja", "tokenizer.model"], ["tokenizer.json"]),
        (["tokenizer.json", "chat_template.jinja", "tokenizer.model.v3"], ["tokenizer.model.v3"]),
        (["chat_template.jinja", "tokenizer.model"], ["tokenizer.model"]),
    ],
)
def test_which_file_wins(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).touch()
    assert tokenizer_files(tmp_path) == [tmp_path / name for name in chosen]


def test_no_tokenizer_names_what_was_looked_for(tmp_path):
    (tmp_path / "vocab.json").touch()
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer.from_folder(tmp_path)
    for part in (str(tmp_path), "tekken.json", "tokenizer.model.v*", "tokenizer.json", "token ids"):
        assert part in str(error.value)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A tekken.json of 3000 tokens beside a tokenizer.model of 2048."""
    folder = tmp_path_factory.mktemp("both")
    write_tekken(folder / "tekken.json")
    (folder / "tokenizer.model").symlink_to(TINY)
    return folder


@pytest.mark.parametrize(
    "vocab, name",
    [(3000, "tekken.json"), (2048, "tokenizer.model"), (2999, "tokenizer.model")],
)
def test_the_model_decides_between_two(both, caplog, vocab, name):
    with caplog.at_level(logging.WARNING, logger="mistral_kernels"):
        tokenizer = Tokenizer.from_folder(both, replace(CONFIG, vocab=vocab))
    assert tokenizer.path == both / name
    assert f"{both}: both tekken.json and tokenizer.model are there; {name} is read" in caplog.text


@pytest.mark.parametrize("vocab", [3001, 2047, None])
def test_two_that_the_model_does_not_settle_are_refused(both, vocab):
    config = vocab and replace(CONFIG, vocab=vocab)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_folder(both, config)
    vocab = "unknown" if vocab is None else vocab
    for part in (f"{both}: tekken.json", "3000", "tokenizer.model", "2048", f"vocab is {vocab}"):
        assert part in str(error.value)
    assert "delete" in str(error.value) and "Tokenizer(path)" in str(error.value)


def test_the_folder_tells_the_model(tmp_path, both):
    for path in both.iterdir():
        (tmp_path / path.name).symlink_to(path)
    params = json.loads((TINY_MIXTRAL / "params.json").read_text(encoding="utf-8"))
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": 3000}))
    assert Tokenizer.from_folder(tmp_path).path.name == "tekken.json"


def test_of_two_of_one_size_tekken_is_read(tmp_path, caplog):
    write_tekken(tmp_path / "tekken.json", tokens=1048)
    (tmp_path / "tokenizer.model.v1").symlink_to(TINY)
    with caplog.at_level(logging.WARNING, logger="mistral_kernels"):
        assert Tokenizer.from_folder(tmp_path).path.name == "tekken.json"
    assert "tekken.json is read" in caplog.text


def test_a_damaged_one_of_two_is_named(tmp_path, both):
    (tmp_path / "tekken.json").symlink_to(both / "tekken.json")
    (tmp_path / "tokenizer.model.v3").write_bytes(b"")
    with pytest.raises(ValueError, match="tokenizer.model.v3: not a tokenizer file"):
        Tokenizer.from_folder(tmp_path)


def test_a_fine_tune_has_its_own_tokens_and_template(tmp_path):
    """A plain tokenizer.model is the base model's; what was added is in the files beside it."""
    backend = byte_level()
    backend.add_special_tokens(["<|im_end|>"])
    (tmp_path / "tokenizer.model").symlink_to(SHIPPED / "tokenizer.model.v1")
    template = "{{ messages[0].content }}{{ eos_token }}"
    write_folder(tmp_path, backend, eos_token="<|im_end|>", chat_template=template)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.kind == "tokenizers"
    assert tokenizer.encode_chat([{"role": "user", "content": "Hi"}])[-1] == tokenizer.eos_id
    assert tokenizer.eos_id == tokenizer.vocab - 1


def test_every_kind_must_fit_the_model(tmp_path, caplog):
    folder = write_folder(tmp_path / "json", byte_level())
    paths = [TINY, write_tekken(tmp_path / "tekken.json"), folder / "tokenizer.json"]
    for path in paths:
        tokenizer = Tokenizer(path)
        tokenizer.check_fits(replace(CONFIG, vocab=tokenizer.vocab))
        expected = f"{path}: {tokenizer.vocab} tokens do not fit a model of vocab"
        with pytest.raises(ValueError, match=f"{expected} {tokenizer.vocab - 1}"):
            tokenizer.check_fits(replace(CONFIG, vocab=tokenizer.vocab - 1))
        assert not caplog.records
        with caplog.at_level(logging.INFO, logger="mistral_kernels"):
            tokenizer.check_fits(replace(CONFIG, vocab=tokenizer.vocab + 1))
        assert f"the model's vocab is {tokenizer.vocab + 1}" in caplog.text
        caplog.clear()
