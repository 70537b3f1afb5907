"""Results of cells on disk: one file per cell, written atomically, found damaged by its hash, shared by processes.

Layout below the results folder: ``cells/<2 hex>/<key>.json.gz``, locks in ``cells/locks/``. A record is the JSON object

    schema_version, key, kind (accuracy|speed), status (ok|failed|skipped), reason, key_fields, rows, sparsity, samples,
    choices, predictor, fit_sha256, elapsed_s, created, log, sha256 (of everything else)
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from suite import files
from suite.errors import InputError
from suite.schema import SCHEMA_VERSION

Record = dict[str, Any]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StoreFullError(RuntimeError):
    """The disk is full; what was written before stays."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same value, everywhere.

    Raises
    ------
    ValueError
        NaN or infinity, which are not numbers to store.
    TypeError
        A value that JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, as :func:`suite.files.write_atomically`, with errors that a user can act on.

    Raises
    ------
    StoreFullError
        No room on the disk.
    InputError
        No permission to write.
    """
    try:
        files.write_atomically(path, data)
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFullError(
                f"disk full while writing {path}: finished cells are kept; free space, repeat"
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) or error.errno == errno.EROFS:
            raise InputError(f"cannot write {path}: {error.strerror}; give another folder with --results") from error
        raise


def finite(value: Any) -> bool:
    """Whether no number inside ``value`` is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(finite, value.values()))
    return all(map(finite, value)) if isinstance(value, (list, tuple)) else True


class CellStore:
    """Records by key below ``root`` (the results folder).

    Parameters
    ----------
    root : Path
        Made on first write.
    say : callable, optional
        Called with one line for each damaged file.
    """

    def __init__(self, root: Path, say: Callable[[str], None] | None = None) -> None:
        self.root = root
        self.folder = root / "cells"
        self._say = say
        self._told: set[str] = set()

    def path(self, key: str) -> Path:
        """File of a record."""
        return self.folder / key[:2] / f"{key}.json.gz"

    def get(self, key: str) -> Record | None:
        """Record of a key; None if there is none or its file is damaged (which is said).

        Raises
        ------
        InputError
            The record was written by a newer version of the suite, or cannot be read.
        """
        path = self.path(key)
        try:
            record = json.loads(gzip.decompress(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
            self._tell_damaged(path, str(error) or type(error).__name__)
            return None
        except OSError as error:
            raise InputError(f"cannot read cell {path}: {error.strerror}") from error
        return self._checked(record, key, path)

    def _checked(self, record: Any, key: str, path: Path) -> Record | None:
        if not isinstance(record, dict):
            self._tell_damaged(path, "no JSON object")
            return None
        version = record.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise InputError(
                f"cell {path} has schema {version}, this version reads up to {SCHEMA_VERSION}: "
                "update countdown-suite or give another folder with --results"
            )
        body = {name: value for name, value in record.items() if name != "sha256"}
        if record.get("key") != key or record.get("sha256") != sha256_of(body):
            self._tell_damaged(path, "its hash does not match")
            return None
        return record

    def _tell_damaged(self, path: Path, why: str) -> None:
        if self._say is not None and path.name not in self._told:
            self._told.add(path.name)
            self._say(f"damaged cell {path.name} ({why}): treated as missing and computed again")

    def records(self) -> list[Record]:
        """All cells, the one that was measured last at the end."""
        keys = (path.name.removesuffix(".json.gz") for path in self.folder.glob("??/*.json.gz"))
        found = [record for key in keys if (record := self.get(key)) is not None]
        return sorted(found, key=lambda record: str(record["created"]))

    def put(self, record: Record) -> None:
        """Store a record under its key, replacing what was there.

        Raises
        ------
        StoreFullError, InputError
            The disk is full; the folder cannot be written.
        """
        body = {"schema_version": SCHEMA_VERSION, **record}
        body = json.loads(canonical(body))  # tuples to lists, so that the hash of what is read back is the same
        body["sha256"] = sha256_of(body)
        write_atomically(self.path(record["key"]), gzip.compress(canonical(body).encode(), 6, mtime=0))

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a key or a named resource; yields False if another process has it and ``wait`` is off."""
        folder = self.folder / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{name}.lock")
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        except OSError as error:
            if error.errno in _FULL:
                raise StoreFullError(f"disk full while locking {folder}: finished cells are kept") from error
            raise InputError(f"cannot write {folder}: {error.strerror}; give another folder with --results") from error
        try:
            yield True
        finally:
            lock.release()
