"""Files that are written whole or not at all, and folders of others that must not lead outside."""

from __future__ import annotations

import contextlib
import glob
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from suite.errors import InputError

_PART = ".part"
_LEFT_S = 3600.0  # nobody writes one file for so long


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, and never through a link.

    A temporary file with a name of its own, fsync, ``os.replace``, fsync of the folder: what stood under ``path``, a
    link included, is replaced itself. The folder is made if it is not there.

    Raises
    ------
    OSError
        As it comes; the old file stays and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_PART}"):  # of killed processes
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.lstat().st_mtime > _LEFT_S:
                left.unlink()
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PART}")
    try:
        # never an existing file: a name that somebody else made, perhaps as a link, is refused
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_part(path: Path) -> bool:
    """Whether a file is what a killed process left of :func:`write_atomically`."""
    return path.name.startswith(".") and path.name.endswith(_PART)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of files in a folder and below it; only where no other process writes."""
    for path in folder.rglob(f".*{_PART}"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def links_in(folder: Path) -> Iterator[str]:
    """Everything below a folder that is neither file nor folder, by relative path: links, pipes, devices."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                yield path.relative_to(folder).as_posix()


def refuse_links(folder: Path) -> None:
    """Refuse a folder in which something leads outside; the folder itself may be a link.

    Raises
    ------
    InputError
        The first link, by name.
    """
    for name in sorted(links_in(folder)):
        raise InputError(
            f"{folder / name} is a link or no plain file: nothing is written there; put a file in its place"
        )
