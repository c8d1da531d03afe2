"""`mistral-kernels chat` with lines of a pipe: answers alone on stdout, and what is refused."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_session import COMMAND, GREEDY, answer_to, hello_and_bell
from command_line import Ended, assert_refused, run_cli
from trained_tokenizers import sentencepiece_form, write_folder

from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.mistral_tokens import SentencePieceTokens


def piped(monkeypatch: pytest.MonkeyPatch, lines: bytes, *options: object) -> Ended:
    """Run chat in this process with these bytes on stdin."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    return run_cli("chat", *GREEDY, "--max-tokens", 60, *options)


def test_a_pipe_gets_answers_and_nothing_else(monkeypatch):
    ended = piped(monkeypatch, b"hello\r\n\nbell:\n/exit\nnever\n")
    assert (ended.status, ended.out.splitlines()) == (0, hello_and_bell())
    lines = ended.err.splitlines()
    assert "not a chat model" in lines[0] and len(lines) == 3
    assert ["tokens/s" in line for line in lines] == [False, True, True]


def test_refused_messages_are_one_line_and_leave_no_trace(monkeypatch):
    lines = b"hello\n\xff\n%s\nbell:" % (b"bell " * 200)
    ended = piped(monkeypatch, lines, "--context", 200)
    assert (ended.status, ended.out.splitlines()) == (0, hello_and_bell())
    refused = [line for line in ended.err.splitlines() if line.startswith("mistral-kernels: ")]
    assert len(refused) == 2
    assert "not UTF-8" in refused[0]
    assert "context is 200" in refused[1] and "/reset" in refused[1]


def test_an_answer_cut_by_max_tokens_or_context_says_so(monkeypatch):
    assert "cut: --max-tokens" in piped(monkeypatch, b"hello\n", "--max-tokens", 2).err
    cut = piped(monkeypatch, b"hello\n", "--context", 22).err
    assert "cut: the context of 22 tokens is full, /reset" in cut


def test_an_answer_without_text_is_told_and_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(SentencePieceTokens, "is_control", lambda self, token: True)
    path = tmp_path / "said.json"
    ended = piped(monkeypatch, b"hello\n/save %s\n" % bytes(path), "--max-tokens", 3)
    assert ended.out == "\n" and "; no answer, so the message is not kept" in ended.err
    assert json.loads(path.read_text())["messages"] == []


@pytest.mark.parametrize("option", ["--system", "--system-file"])
def test_the_system_prompt_reaches_the_model(option, tmp_path, monkeypatch):
    text = "Be brief."
    if option == "--system-file":
        (tmp_path / "system.txt").write_text("Be brief.\n")
        text = tmp_path / "system.txt"
    ended = piped(monkeypatch, b"hello\n/save %s\n" % bytes(tmp_path / "said.json"), option, text)
    expected = answer_to(["hello"], TINY_MIXTRAL, system="Be brief.")
    assert ended.out.splitlines() == [expected] != hello_and_bell()[:1]
    saved = json.loads((tmp_path / "said.json").read_text())
    assert saved["system"] == "Be brief." and saved["messages"][1]["content"] == expected


@pytest.mark.parametrize(
    ("folder", "name", "is_chat"),
    [
        ("Tiny-Instruct-v1", "Tiny-Instruct-v1", True),
        ("Tiny-v1", "Tiny-v1", False),
        ("models--me--Tiny-Chat/snapshots/0123abcd", "me/Tiny-Chat", True),
    ],
)
def test_the_first_line_tells_a_chat_model_by_its_name(
    folder, name, is_chat, tmp_path, monkeypatch
):
    shutil.copytree(TINY_MIXTRAL, tmp_path / folder)
    first = piped(monkeypatch, b"", tmp_path / folder).err.splitlines()[0]
    assert first.startswith(f"{name}, tokenizer v1") and ("not a chat model" in first) != is_chat


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_folder_with_only_a_tokenizer_json_needs_a_chat_template(template, tmp_path, monkeypatch):
    for name in ("params.json", "consolidated.safetensors"):
        shutil.copy(TINY_MIXTRAL / name, tmp_path)
    write_folder(tmp_path, sentencepiece_form(control=("<unk>", "<s>", "</s>")))
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    ended = piped(monkeypatch, b"hello\nbell:\n", tmp_path)
    if template is None:
        assert_refused(ended, str(tmp_path), "chat needs", "chat_template.jinja")
        return
    assert "tokenizer.json" in ended.err.splitlines()[0] and "not a chat model" not in ended.err
    first = answer_to(["hello"], tmp_path)
    assert ended.out.splitlines() == [first, answer_to(["hello", first, "bell:"], tmp_path)]


def test_save_overwrites_no_file_that_it_did_not_write(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    path.write_text("mine")
    ended = piped(monkeypatch, b"/save %s\n/save %s\n" % (bytes(path), bytes(tmp_path)))
    assert ended.status == 0 and ended.err.count("exists already") == 2
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["mine.json"]


def test_a_seed_repeats_a_chat_but_not_its_turns(monkeypatch):
    options = ["--temperature", 5, "--max-tokens", 20, "--seed"]
    first, again, other = (
        piped(monkeypatch, b"hello\n/reset\nhello\nhello\n", *options, seed).out.splitlines()
        for seed in (3, 3, 4)
    )
    assert first == again != other
    assert first[0] == first[1] != first[2]


def test_closed_stdin_is_one_line():
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "stdin is closed" in done.stderr


def test_a_full_disk_leaves_no_file_behind(tmp_path, monkeypatch):
    def replace(part, target):
        assert part.stat().st_size  # what did fit is there, under another name
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", replace)
    ended = piped(monkeypatch, b"/save %s\nhello\n" % bytes(tmp_path / "said.json"))
    assert f"/save: {tmp_path}/said.json: No space left" in ended.err
    assert os.listdir(tmp_path) == [] and ended.status == 0 and ended.out
