"""Faults planted into a copy of a kernel, each of which its test must notice."""

import shutil
from pathlib import Path
from typing import NamedTuple

from emulator.host_build import PLANTED


class Fault(NamedTuple):
    """What is wrong with a copy of a kernel, and the texts that make it so."""

    name: str
    edits: dict[str, str]  # right to wrong
    header: Path | None = None  # to change instead of the kernel's source, which includes it


def plant(source: Path, fault: Fault) -> Path:
    """Write a copy of `source` with the fault; each right text must be there exactly once."""
    original = fault.header or source
    text = original.read_text()
    for right, wrong in fault.edits.items():
        assert text.count(right) == 1, f"{original.name} no longer has: {right}"
        text = text.replace(right, wrong)
    folder = PLANTED / source.stem / fault.name.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    # A header is found beside the source before the one that is shipped.
    copy = folder / "cuda" / original.name if fault.header else folder / source.name
    copy.parent.mkdir(parents=True)
    if fault.header:
        shutil.copy(source, folder)
    copy.write_text(text)
    return folder / source.name
