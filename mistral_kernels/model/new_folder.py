"""A folder that appears with all of its files, or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path


def check_new_folder(folder: Path, overwrite: bool, replaceable: tuple[str, ...]) -> Path:
    """Checks that `folder` may be made, or replaced.

    Args:
        folder: where.
        overwrite: an existing folder may be replaced.
        replaceable: patterns of the names of files that may be replaced; nothing else may be lost.

    Returns:
        The folder as an absolute path without links.

    Raises:
        FileExistsError: the folder is not empty and may not be replaced, or it holds links.
        NotADirectoryError: it is a file, or below one.
        ValueError: it is a mount point or holds the current folder, so it cannot be replaced.
    """
    folder = folder.resolve()
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"{folder}: cannot be a folder, as {part} is a file")
    if not folder.exists():
        return folder
    for name in sorted(os.listdir(folder)):
        if not overwrite:
            raise FileExistsError(
                f"{folder}: not empty; overwrite=True replaces the checkpoint in it"
                " (on the command line --overwrite)"
            )
        if not any(fnmatch(name, pattern) for pattern in replaceable):
            raise FileExistsError(f"{folder}: not replaced, {name} is no part of a checkpoint")
        if (folder / name).is_symlink():
            # Other programs would take what replaced a snapshot for the published model.
            raise FileExistsError(f"{folder}: not replaced, {name} is a link, as in a hub cache")
    if os.path.ismount(folder) or Path.cwd().is_relative_to(folder):
        raise ValueError(
            f"{folder}: a mount point or the current folder cannot be replaced; name one below it"
        )
    return folder


@contextmanager
def new_folder(folder: Path, overwrite: bool, replaceable: tuple[str, ...]) -> Iterator[Path]:
    """Makes a folder, or replaces one, as a whole.

    Args:
        folder: as `check_new_folder` returned it; folders above it are made.
        overwrite, replaceable: as there. What others have written to the folder by the end of the
            block is not lost either.

    Yields:
        An empty folder beside it, to be filled. When the block ends, its files are synced to the
        disk and it is renamed to `folder`; if the block raises, KeyboardInterrupt included, it is
        removed and what was at `folder` is as before.

    Raises:
        OSError: the disk is full, or the place cannot be written, or was taken meanwhile.
    """
    anchor = next(parent for parent in folder.parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=anchor) as beside:
        new = Path(beside, "new")
        new.mkdir()  # unlike the temporary folder, with the user's default permissions
        yield new
        put_in_place(new, folder, Path(beside, "old"), overwrite, replaceable)


def put_in_place(
    new: Path, folder: Path, old: Path, overwrite: bool, replaceable: tuple[str, ...]
) -> None:
    """Syncs the files of `new` to the disk and renames it to `folder`.

    Args:
        new: a folder on the same file system.
        folder, overwrite, replaceable: as `new_folder` takes them.
        old: where what is replaced goes; if the renaming fails it comes back.
    """
    for path in (*new.iterdir(), new):
        sync(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_new_folder(folder, overwrite, replaceable)
    try:
        if overwrite and folder.exists():
            folder.rename(old)
        new.rename(folder)  # in place of an empty folder too, but of no other
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync(folder.parent)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if os.name == "nt":  # syncs neither folders nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
