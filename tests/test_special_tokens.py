"""The tokens that begin and end a text of a tokenizer.json, told by the files beside it; damage."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from trained_tokenizers import byte_level, sentencepiece_form, write_folder
from transformers import PreTrainedTokenizerFast

from mistral_kernels.model.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "files, ends",
    [
        (
            {"tokenizer_config": {"bos_token": "[INST]", "eos_token": {"content": "[/INST]"}}},
            (3, 4),
        ),
        ({"special_tokens_map": {"bos_token": {"content": "[INST]"}}}, (3, 2)),
        (
            {
                "special_tokens_map": {"eos_token": "<unk>"},
                "tokenizer_config": {"eos_token": "[INST]", "bos_token": None},
                "config": {"eos_token_id": 1},
            },
            (1, 3),
        ),
        ({"generation_config": {"bos_token_id": 3, "eos_token_id": [4, 2]}}, (3, 4)),
        ({"config": {"text_config": {"bos_token_id": 3, "eos_token_id": 4}}}, (3, 4)),
        ({"generation_config": {"eos_token_id": 4}, "config": {"eos_token_id": 5}}, (1, 4)),
        ({}, (1, 2)),
    ],
)
def test_where_the_ends_of_a_text_are_told(tmp_path, files, ends):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ends


def test_whether_a_text_begins_with_its_token(tmp_path):
    bare = sentencepiece_form()
    bare.post_processor = None
    cases = [(byte_level(), {}), (byte_level(), {"add_bos_token": False})]
    cases += [(bare, {}), (bare, {"add_bos_token": True})]
    for number, (backend, config) in enumerate(cases):
        folder = write_folder(tmp_path / str(number), backend, **config)
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.add_bos == (tokenizer.encode("a")[0] == tokenizer.bos_id) == (number != 2)
        if number != 3:  # transformers 5 does not do what the last one says
            theirs = PreTrainedTokenizerFast.from_pretrained(folder)
            assert tokenizer.encode("a") == theirs.encode("a")


def test_a_file_without_ends(tmp_path):
    backend = byte_level()
    text = backend.to_str().replace('"<s>"', '"<begin>"').replace('"</s>"', '"<end>"')
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, None, False)
    assert tokenizer.decode(tokenizer.encode("a text")) == "a text"


def damaged(**changes: object) -> str:
    return json.dumps(json.loads(byte_level().to_str()) | changes)


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("tokenizer.json", "", "not a tokenizer file"),
        ("tokenizer.json", "[]", "not a tokenizer file"),
        ("tokenizer.json", "{}", "not a tokenizer file"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "not a tokenizer file"),
        ("tokenizer.json", damaged()[:3000], "not a tokenizer file"),
        ("tokenizer.json", Backend(BPE()).to_str(), "no tokens"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", '{"eos_token": "<|end|>"}', "no token '<|end|>', eos_token of"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "eos_token: not Unicode text"),
        ("special_tokens_map.json", "\ufffe", "not valid JSON"),
        ("generation_config.json", '{"eos_token_id": 9999}', "no token of id 9999, eos_token_id"),
        ("generation_config.json", '{"eos_token_id": "2"}', "expected a token id, got '2'"),
        ("config.json", '{"bos_token_id": -1}', "expected a token id, got -1"),
    ],
)
def test_damage_is_named(tmp_path, name, content, part):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and name in str(error.value)
    assert part in str(error.value) and "\n" not in str(error.value)
