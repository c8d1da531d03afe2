"""Text that a command is given: by an option, in a file, through stdin, or typed line by line."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import typer

QUOTES = '"""'


def given_text(option: str, text: str | None, path: Path | None) -> str | None:
    """The text of `option`, or of the file of `option`-file without the newline at its end.

    Returns:
        None if neither was given.

    Raises:
        ValueError: both were given, or the text is empty or no UTF-8.
        OSError: the file cannot be read.
    """
    if text is not None and path is not None:
        raise ValueError(f"{option} and {option}-file exclude each other")
    if text is not None:
        return _prompt(option, os.fsencode(text))  # the bytes that the shell passed
    if path is not None:
        return _prompt(str(path), _without_newline(path.read_bytes()))
    return None


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of --prompt or --prompt-file, or else all of stdin; errors as `given_text`."""
    text = given_text("--prompt", prompt, prompt_file)
    if text is not None:
        return text
    if sys.stdin is None:
        raise ValueError("stdin is closed: give a --prompt or a --prompt-file")
    if sys.stdin.isatty():
        print("Type the prompt; Ctrl-D on an empty line ends it.", file=sys.stderr)
    return _prompt("stdin", _without_newline(sys.stdin.buffer.read()))


def read_text(path: Path) -> str:
    """The text of a file; a ValueError names it if it holds none, or no UTF-8."""
    text = _decoded(str(path), path.read_bytes())
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def _prompt(source: str, data: bytes) -> str:
    if not data:
        raise ValueError(f"{source}: the prompt is empty")
    return _decoded(source, data)


def _decoded(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8: {error}") from error


def _without_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r")


class Typed(NamedTuple):
    """A message, or a command: a first line that begins with "/"."""

    text: str
    is_command: bool


class MessageReader:
    """Reads what is said in a chat, from a terminal or a pipe: one message a line.

    A line that ends in a backslash goes on in the next one; a message that begins with three double
    quotes ends with the next three, lines later or on the same line.

    Attributes:
        interactive: whether somebody types at a terminal; only then there are prompts.

    Raises:
        ValueError: stdin is closed.
    """

    def __init__(self):
        if sys.stdin is None:
            raise ValueError("stdin is closed: chat reads its messages there")
        self.interactive = sys.stdin.isatty()
        self._editing = self.interactive and sys.stdout is not None and sys.stdout.isatty()
        if self._editing:
            with contextlib.suppress(ImportError):  # Python may be built without it
                importlib.import_module("readline")  # gives input() line editing and a history

    def read(self) -> Typed | None:
        """Return what was said next, None at the end of the input.

        Raises:
            ValueError: a line is no UTF-8; the next call reads on behind it.
        """
        line = self._line(">>> ")
        if line is None:
            return None
        if line.startswith("/"):
            return Typed(line.strip(), True)
        if line.startswith(QUOTES):
            return Typed(self._block(line.removeprefix(QUOTES)), False)
        while line.endswith("\\"):
            line = line.removesuffix("\\") + "\n" + (self._line("... ") or "")
        return Typed(line, False)

    def _block(self, text: str) -> str:
        """The lines up to the closing quotes, or to the end of the input."""
        while not text.rstrip().endswith(QUOTES):
            line = self._line("... ")
            if line is None:
                break
            text += "\n" + line
        return text.rstrip().removesuffix(QUOTES).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self._editing:
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.interactive:  # but stdout is not: it gets the answers alone
            typer.echo(prompt, nl=False, err=True)
        data = sys.stdin.buffer.readline()
        return _decoded("stdin", _without_newline(data)) if data else None
