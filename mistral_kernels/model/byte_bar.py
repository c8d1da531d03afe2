"""The progress bar of a checkpoint that is read or written."""

import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn


def byte_bar(doing: str) -> Progress:
    """A bar on stderr that counts bytes and vanishes at its end; silent where it could not vanish.

    Args:
        doing: the word in front of the bar.
    """
    columns = (doing, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    quiet = console.is_dumb_terminal or not (sys.stderr and sys.stderr.isatty())
    return Progress(*columns, console=console, transient=True, disable=quiet)
