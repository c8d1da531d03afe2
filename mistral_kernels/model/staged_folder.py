"""A folder that is filled over hours, in several attempts if need be, and appears as a whole.

Its files gather in a folder beside it. Each appears there when it is complete and on the disk, so
whatever kills the work, what is found there later is done. A plan, written first, tells what work
it was.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_kernels.model.json_fields import read_json
from mistral_kernels.model.new_folder import put_in_place, sync

PLAN = ".plan.json"
UNFINISHED = ".part"  # ending of a file that is being written


def staging_place(folder: Path) -> Path:
    """Where the files of `folder` gather."""
    return folder.with_name(f".unfinished-{folder.name}")


@contextmanager
def staged_folder(
    folder: Path, plan: dict[str, Any], overwrite: bool, replaceable: tuple[str, ...]
) -> Iterator[Path]:
    """Goes on with a folder, or begins it.

    Args:
        folder, overwrite, replaceable: as `check_new_folder` took and returned them.
        plan: all that the files' contents depend on, as json gives it back.

    Yields:
        The folder in which the files gather; those that `finished_file` made before are in it.
        When the block ends it becomes `folder`; if the block raises, it stays for the next time.

    Raises:
        FileExistsError: unfinished work of another plan is there, or somebody is at it.
        OSError: as `new_folder`.
    """
    new = staging_place(folder)
    new.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".old-{folder.name}")
    with _alone(new):
        _begin(new, plan)
        yield new
        # Killed from here to the renaming, the next attempt finds no plan and begins anew.
        (new / PLAN).unlink()
        # Killed behind the renaming, an earlier one has left it, and nothing can be renamed to it.
        shutil.rmtree(old, ignore_errors=True)
        put_in_place(new, folder, old, overwrite, replaceable)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """Yields the path to write a file to, which becomes `path` when it is complete."""
    part = path.with_name(path.name + UNFINISHED)
    try:
        yield part
        sync(part)
        part.rename(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _begin(new: Path, plan: dict[str, Any]) -> None:
    """Checks the plan of what is there, or makes this one the plan of an empty folder."""
    path = new / PLAN
    if not path.exists():
        for file in new.iterdir():
            file.unlink()
        with finished_file(path) as part:
            part.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    found = read_json(path)
    for key, value in plan.items():
        if found.get(key) != value:
            raise FileExistsError(
                f"{new}: holds unfinished work of another {key}, {found.get(key)!r:.80} and not"
                f" {value!r:.80}; finish it with that one, or remove the folder"
            )
    for file in new.glob(f"*{UNFINISHED}"):
        file.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps others out of a folder; the system forgets it when this process ends, however."""
    if os.name == "nt":  # has no such locks; two at once would spoil each other's files
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(f"{folder}: another process is at work there") from error
    else:
        yield
    finally:
        os.close(descriptor)
