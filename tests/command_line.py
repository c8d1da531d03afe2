"""Runs `mistral-kernels` inside the test process."""

import contextlib
import io
import json
from typing import NamedTuple

import pytest

from mistral_kernels.cli import main


class Ended(NamedTuple):
    """What a command left: its exit status and all that it wrote."""

    status: int
    out: str
    err: str


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run_cli(*arguments: object, terminal: bool = False) -> Ended:
    """Run the command line with these arguments, each made a string; `terminal`: stderr is one."""
    out, err = io.StringIO(), Terminal() if terminal else io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    return Ended(ended.value.code or 0, out.getvalue(), err.getvalue())


def generate_json(*arguments: object) -> dict:
    """Run `generate --json` on the CPU and return its object."""
    ended = run_cli("generate", "--json", "--device", "cpu", *arguments)
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


def assert_refused(ended: Ended, *parts: str) -> None:
    """Check for status 2, nothing on stdout, and one line on stderr that holds all parts."""
    assert (ended.status, ended.out) == (2, "") and ended.err.endswith("\n"), ended.err
    assert ended.err.count("\n") == 1, ended.err
    for part in parts:
        assert part in ended.err
