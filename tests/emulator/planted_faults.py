"""Faults planted into a copy of a kernel, each of which its test must notice."""

from pathlib import Path
from typing import NamedTuple

from emulator.host_build import BUILD


class Fault(NamedTuple):
    """What is wrong with the copy, and the text of the source that makes it so."""

    name: str
    right: str
    wrong: str


def plant(source: Path, fault: Fault) -> Path:
    """Write a copy of `source` with the fault, whose right text must be there exactly once."""
    text = source.read_text()
    assert text.count(fault.right) == 1, f"{source.name} no longer has: {fault.right}"
    folder = BUILD / "planted" / fault.name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    copy, wrong = folder / source.name, text.replace(fault.right, fault.wrong)
    # Another process of the test run may be compiling it.
    if not copy.exists() or copy.read_text() != wrong:
        copy.write_text(wrong)
    return copy
