"""The progress bar of a checkpoint that is read or written."""

import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn


def byte_bar(doing: str) -> Progress:
    """A bar on stderr that counts bytes and vanishes at its end; silent where that is no terminal.

    Args:
        doing: the word in front of the bar.
    """
    columns = (doing, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    quiet = not (sys.stderr and sys.stderr.isatty())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)
