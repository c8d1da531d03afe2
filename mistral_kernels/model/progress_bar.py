"""Progress bars on stderr."""

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TransferSpeedColumn,
)


def byte_bar(doing: str) -> Progress:
    """A bar that counts the bytes of a checkpoint that is read or written.

    Args:
        doing: the word in front of the bar.
    """
    return _bar(doing, DownloadColumn(), TransferSpeedColumn())


def counting_bar(counted: str) -> Progress:
    """A bar that counts things, which `counted` names in front of it."""
    return _bar(counted, MofNCompleteColumn())


def _bar(label: str, *columns: ProgressColumn) -> Progress:
    """One that vanishes at its end, and is silent where it could not vanish."""
    console = Console(stderr=True)
    quiet = console.is_dumb_terminal or not (sys.stderr and sys.stderr.isatty())
    return Progress(label, BarColumn(), *columns, console=console, transient=True, disable=quiet)
