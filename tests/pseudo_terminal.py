"""A program on a terminal of its own, typed at and read as a person would."""

import codecs
import fcntl
import os
import select
import signal
import subprocess
import termios
import time

CONTROL_C, CONTROL_D = "\x03", "\x04"


class PseudoTerminal:
    """Runs a command with stdin, stdout and stderr on a new terminal; a context manager.

    Attributes:
        process: the running command.
    """

    def __init__(self, command: list[str], timeout: float = 60):
        self._timeout = timeout
        self._screen, keyboard = os.openpty()

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(keyboard, termios.TIOCSCTTY, 0)  # so that Ctrl-C is sent to the command
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        # dumb: no escape sequences around what is typed.
        environment = os.environ | {"TERM": "dumb", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            command,
            stdin=keyboard,
            stdout=keyboard,
            stderr=keyboard,
            preexec_fn=own_terminal,
            env=environment,
        )
        os.close(keyboard)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ahead = ""

    def __enter__(self) -> "PseudoTerminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def read_until(self, expected: str) -> str:
        """Return what is shown from now on, up to the first `expected`, which ends it."""
        while expected not in self._ahead:
            self._read()
        text, _, self._ahead = self._ahead.partition(expected)
        return text + expected

    def read_characters(self, number: int) -> str:
        """Return the next characters that are shown."""
        while len(self._ahead) < number:
            self._read()
        text, self._ahead = self._ahead[:number], self._ahead[number:]
        return text

    def interrupt(self, expected: str) -> None:
        """Type Ctrl-C at a prompt until `expected` is shown.

        Python may miss a signal that comes just before it waits for a key, until there is one.
        """
        deadline = time.monotonic() + self._timeout
        while expected not in self._ahead:
            assert time.monotonic() < deadline, f"no {expected!r} but {self._ahead[-500:]!r}"
            self.type(CONTROL_C)
            while expected not in self._ahead and self._shows_more(within=2):
                self._read()
        self._ahead = self._ahead.partition(expected)[2]

    def _shows_more(self, within: float) -> bool:
        return bool(select.select([self._screen], [], [], within)[0])

    def _read(self) -> None:
        """Adds to what is shown but not yet asked for."""
        last = self._ahead[-500:]
        assert self._shows_more(within=self._timeout), (
            f"nothing for {self._timeout} s after {last!r}"
        )
        try:
            data = os.read(self._screen, 4096)
        except OSError:  # the command has ended
            data = b""
        assert data, f"the command ended after {last!r}"
        self._ahead += self._decoder.decode(data).replace("\r", "")

    def end(self) -> int:
        """Wait for the command's end and return its status."""
        return self.process.wait(timeout=self._timeout)
