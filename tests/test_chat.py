"""`mistral-kernels chat` on a terminal of its own: what it shows, what Ctrl-C does, how it ends."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from chat_session import COMMAND, GREEDY, answer_to, hello_and_bell, said
from pseudo_terminal import CONTROL_C, CONTROL_D, PseudoTerminal
from safetensors.torch import load_file, save_file

from mistral_kernels import Transformer, chat
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.tokenizer import Tokenizer
from mistral_kernels.options import Sampling
from mistral_kernels.text_input import Typed

PROMPT = ">>> "


def test_a_session_at_a_terminal(tmp_path):
    first, second = hello_and_bell()
    path = tmp_path / "said.json"
    with PseudoTerminal([*COMMAND, *GREEDY, "--max-tokens", "60"]) as terminal:
        lines = terminal.read_until(PROMPT).splitlines()
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
            (f"/save {'a' * 300}", "/save: .*a: File name too long"),
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
        for _ in range(2):  # Ctrl-C drops what was typed and not yet read
            terminal.read_until("... ")
        terminal.interrupt("Ctrl-D or /exit ends the chat")
        terminal.read_until(PROMPT)
        terminal.type(f"/save {tmp_path / 'said.json'}\n")
        terminal.read_until("6 messages are in")
    assert said(tmp_path / "said.json")[::2] == ["one\ntwo\nthree", "/four\n\nfive", "six"]


@pytest.mark.parametrize(("end", "status"), [("close", 1), ("interrupt", 130)])
def test_a_pipe_closed_behind_it_and_control_c_end_it_quietly(end, status, endless):
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
        assert process.returncode == status
        assert b"Traceback" not in process.stderr.read()


def test_control_c_again_while_the_last_one_is_answered(monkeypatch, capsys):
    """Held down, it comes while chat tells what Ctrl-C does, too."""
    tell, interrupts = chat._tell, iter(range(5))

    def interrupted(text: str) -> None:
        if text.startswith("\nCtrl-C") and next(interrupts, None) is not None:
            raise KeyboardInterrupt
        tell(text)

    class Reader:
        interactive = True
        typed = iter([KeyboardInterrupt, Typed("/nonsense", True), Typed("/exit", True)])

        def read(self) -> Typed:
            typed = next(self.typed)
            if typed is KeyboardInterrupt:
                raise typed
            return typed

    monkeypatch.setattr(chat, "_tell", interrupted)
    model = Transformer.from_folder(TINY_MIXTRAL, device="cpu")
    chat.run_chat(model, model.tokenizer, Reader(), Sampling(max_tokens=3, temperature=0.0))
    told = capsys.readouterr().err
    assert "Ctrl-D or /exit ends" in told and "no command /nonsense" in told
    assert next(interrupts, None) is None
