"""What the emulator builds is made once, and kept while it is used."""

import os
import time
from pathlib import Path

import pytest
from emulator import host_build


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Builds a file from some content by a command that notes each of its runs in `ran`."""
    monkeypatch.setattr(host_build, "BUILD", tmp_path)
    command = ["sh", "-c", f'echo >> {tmp_path / "ran"}; touch "$1"']  # called with -o FILE
    return lambda content: host_build.once(Path("made"), ".o", command, content)


def test_the_same_content_is_built_once(make, tmp_path):
    first, other, again = make(b"1"), make(b"2"), make(b"1")
    assert first == again != other and first.is_file() and other.is_file()
    assert len((tmp_path / "ran").read_text()) == 2


def test_what_was_not_used_for_a_week_is_removed(make):
    unused, used, new = make(b"1"), make(b"2"), make(b"3")
    for file in (unused, used):
        os.utime(file, (0, time.time() - 8 * 24 * 3600))
    make(b"2")
    host_build.remove_unused()
    assert [file.exists() for file in (unused, used, new)] == [False, True, True]
