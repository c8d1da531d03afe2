"""`mistral-kernels chat` on a terminal of its own and in a pipe: what it shows, takes and keeps."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Ended, assert_refused, run_cli
from pseudo_terminal import CONTROL_C, CONTROL_D, PseudoTerminal
from safetensors.torch import load_file, save_file
from trained_tokenizers import sentencepiece_form, write_folder

from mistral_kernels import Transformer, generate
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.tokenizer import Tokenizer

COMMAND = [sys.executable, "-m", "mistral_kernels.cli", "chat"]
GREEDY = ["--device", "cpu", "--dtype", "float32", "--temperature", "0"]
PROMPT = ">>> "


def said(path: Path) -> list[str]:
    """The contents of a saved conversation."""
    return [message["content"] for message in json.loads(path.read_text())["messages"]]


def answer_to(spoken: list[str], folder: Path, *, system: str = "", max_tokens: int = 60) -> str:
    """What the model answers to messages of the user and itself in turn, on a cache of its own."""
    model = Transformer.from_folder(folder, device="cpu", dtype=torch.float32)
    tokenizer = Tokenizer.from_folder(folder)
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": r, "content": text} for r, text in zip(roles, spoken, strict=False)]
    ids = tokenizer.encode_chat(messages)
    tokens = generate([ids], model, max_tokens=max_tokens, eos_id=tokenizer.eos_id)[0][0]
    return tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def hello() -> tuple[str, str]:
    """The embedded model's greedy answers to "hello" and then "bell:"."""
    first = answer_to(["hello"], TINY_MIXTRAL)
    return first, answer_to(["hello", first, "bell:"], TINY_MIXTRAL)


def test_a_session_at_a_terminal(tmp_path, hello):
    first, second = hello
    path = tmp_path / "said.json"
    with PseudoTerminal([*COMMAND, *GREEDY, "--max-tokens", "60"]) as terminal:
        # Where the bar that shows loading was, a dumb terminal has an empty line.
        lines = terminal.read_until(PROMPT).lstrip().splitlines()
        for part in ("tiny_mixtral", "tokenizer v1", "float32 on cpu", "not a chat model"):
            assert part in lines[0]
        terminal.type("hello\n")
        turn = terminal.read_until(PROMPT)
        assert turn.startswith(f"hello\n{first}\n") and "; 0 tokens reused" in turn
        terminal.type("bell:\n")
        turn = terminal.read_until(PROMPT)
        assert turn.startswith(f"bell:\n{second}\n") and "; 19 tokens reused" in turn
        terminal.type("\n/help\n")
        assert terminal.read_until(f"many lines.\n{PROMPT}").startswith(f"\n{PROMPT}/help\n/reset")
        for typed, shown in (
            ("/nonsense", "there is no command /nonsense"),
            ("/save", "/save wants the name of a file"),
            (f"/save {tmp_path}/no/where", "/save: .*/no/where: No such file"),
            (f"/save {path}", f"4 messages are in {path}"),
            (f"/save {path}", f"4 messages are in {path}"),
            ("/reset now", "/reset takes no argument"),
            ("/reset", "The conversation is empty."),
        ):
            terminal.type(f"{typed}\n")
            lines = terminal.read_until(f"\n{PROMPT}").splitlines()
            assert len(lines) == 3 and re.search(shown, lines[1])
        terminal.type("hello\n")
        assert terminal.read_until(PROMPT).startswith(f"hello\n{first}\n")
        terminal.type("/exit\n")
        assert terminal.end() == 0
    assert said(path) == ["hello", first, "bell:", second]
    assert os.listdir(tmp_path) == ["said.json"]


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """The embedded model, unable to end an answer by itself."""
    folder = shutil.copytree(TINY_MIXTRAL, tmp_path_factory.mktemp("endless") / "model")
    weights = load_file(folder / "consolidated.safetensors")
    # It ties its embeddings: the logit of EOS is now 0, and others are greater.
    weights["tok_embeddings.weight"][Tokenizer.from_folder(folder).eos_id] = 0
    save_file(weights, folder / "consolidated.safetensors")
    return folder


def test_control_c_stops_the_answer_and_not_the_chat(endless, tmp_path):
    """What was said until then stays, and the next answer is as from a cache of its own."""
    path = tmp_path / "said.json"
    with PseudoTerminal([*COMMAND, endless, *GREEDY, "--max-tokens", "7000"]) as terminal:
        terminal.read_until(PROMPT)
        for question in ("hello", "what is a bell?", "go on"):
            terminal.type(f"{question}\n")
            terminal.read_until("\n")  # its echo
            terminal.read_characters(100)
            terminal.type(CONTROL_C)
            assert "; stopped" in terminal.read_until(f"\n{PROMPT}").splitlines()[-2]
        terminal.type("not sent")
        terminal.read_until("not sent")
        terminal.interrupt("Ctrl-D or /exit ends the chat")
        terminal.read_until(PROMPT)
        terminal.type(f"/save {path}\n")
        terminal.read_until(PROMPT)
        terminal.type(CONTROL_D)
        assert terminal.end() == 0
    spoken = said(path)
    assert spoken[::2] == ["hello", "what is a bell?", "go on"]
    for turn in range(3):
        answer = spoken[2 * turn + 1]
        fresh = answer_to(spoken[: 2 * turn + 1], endless, max_tokens=len(answer))
        assert len(answer) >= 99 and fresh.startswith(answer)


def test_messages_of_many_lines(tmp_path):
    typed = (
        "one\\\ntwo\\\nthree\n",
        '"""\n/four\n\nfive\n"""\n',
        '"""six"""\n',
    )
    with PseudoTerminal([*COMMAND, *GREEDY, "--max-tokens", "3"]) as terminal:
        terminal.read_until(PROMPT)
        for text in typed:
            terminal.type(text)
            assert terminal.read_until(PROMPT).count("... ") == text.count("\n") - 1
        terminal.type('"""\nnever\n')
        terminal.interrupt("Ctrl-D or /exit ends the chat")
        terminal.read_until(PROMPT)
        terminal.type(f"/save {tmp_path / 'said.json'}\n")
        terminal.read_until("6 messages are in")
    assert said(tmp_path / "said.json")[::2] == ["one\ntwo\nthree", "/four\n\nfive", "six"]


def piped(monkeypatch: pytest.MonkeyPatch, lines: bytes, *options: object) -> Ended:
    """Run chat in this process with these bytes on stdin."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    return run_cli("chat", *GREEDY, "--max-tokens", 60, *options)


def test_a_pipe_gets_answers_and_nothing_else(monkeypatch, hello):
    ended = piped(monkeypatch, b"hello\r\n\nbell:\n/exit\nnever\n")
    assert (ended.status, ended.out.splitlines()) == (0, [*hello])
    lines = ended.err.splitlines()
    assert "not a chat model" in lines[0] and len(lines) == 3
    assert ["tokens/s" in line for line in lines] == [False, True, True]


def test_refused_messages_are_one_line_and_leave_no_trace(monkeypatch, hello):
    lines = b"hello\n\xff\n%s\nbell:" % (b"bell " * 200)
    ended = piped(monkeypatch, lines, "--context", 200)
    assert (ended.status, ended.out.splitlines()) == (0, [*hello])
    refused = [line for line in ended.err.splitlines() if line.startswith("mistral-kernels: ")]
    assert len(refused) == 2
    assert "not UTF-8" in refused[0]
    assert "context is 200" in refused[1] and "/reset" in refused[1]


def test_an_answer_cut_by_max_tokens_or_context_says_so(monkeypatch):
    assert "cut: --max-tokens" in piped(monkeypatch, b"hello\n", "--max-tokens", 2).err
    cut = piped(monkeypatch, b"hello\n", "--context", 22).err
    assert "cut: the context of 22 tokens is full, /reset" in cut


@pytest.mark.parametrize("option", ["--system", "--system-file"])
def test_the_system_prompt_reaches_the_model(option, tmp_path, monkeypatch, hello):
    text = "Be brief."
    if option == "--system-file":
        (tmp_path / "system.txt").write_text("Be brief.\n")
        text = tmp_path / "system.txt"
    ended = piped(monkeypatch, b"hello\n/save %s\n" % bytes(tmp_path / "said.json"), option, text)
    expected = answer_to(["hello"], TINY_MIXTRAL, system="Be brief.")
    assert ended.out.splitlines() == [expected] != [hello[0]]
    saved = json.loads((tmp_path / "said.json").read_text())
    assert saved["system"] == "Be brief." and saved["messages"][1]["content"] == expected


@pytest.mark.parametrize(("name", "is_chat"), [("Tiny-Instruct-v1", True), ("Tiny-v1", False)])
def test_the_first_line_tells_a_chat_model_by_its_name(name, is_chat, tmp_path, monkeypatch):
    folder = shutil.copytree(TINY_MIXTRAL, tmp_path / name)
    first = piped(monkeypatch, b"", folder).err.splitlines()[0]
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
        assert_refused(ended, "tokenizer.json", "chat_template.jinja")
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


def test_a_pipe_closed_behind_it_and_control_c_end_it_quietly(endless):
    for end in ("close", "interrupt"):
        with subprocess.Popen(
            [*COMMAND, endless, *GREEDY, "--max-tokens", "7000"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            process.stdin.write(b"hello\n")
            process.stdin.flush()
            assert process.stdout.read(1)
            if end == "close":
                process.stdout.close()
            else:
                process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            assert process.returncode == (1 if end == "close" else 130)
            assert b"Traceback" not in process.stderr.read()


def test_closed_stdin_is_one_line():
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "stdin is closed" in done.stderr
