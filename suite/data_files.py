"""The reader of every text and JSON Lines file that is scored or fitted on; loads neither torch nor lm-eval."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suite.errors import InputError

JSONL = (".jsonl", ".jsonl.gz")
SUFFIXES = (".txt", ".txt.gz", *JSONL)
MAX_BYTES = 2**30  # of a file's text: what a few megabytes of gzip can hold would take all memory


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is not an error but False."""
    return os.path.isfile(path)  # noqa: PTH113  Path.is_file raises for a name that is too long


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a name that no folder can have is not an error but False."""
    return os.path.isdir(path)  # noqa: PTH112  Path.is_dir raises for a name that is too long


def need_suffix(path: Path) -> None:
    """Refuse a file whose form is not known: JSON or a table would be taken for prose.

    Raises
    ------
    InputError
        Its name ends in none of `SUFFIXES`.
    """
    if not path.name.endswith(SUFFIXES):
        raise InputError(
            f"{path}: must end in {', '.join(SUFFIXES)}; write its documents one a line as JSON objects (.jsonl), or as "
            "paragraphs between blank lines (.txt)"
        )


def read_text(path: Path) -> str:
    """Text of a file, unpacked if its name ends in .gz, with a newline for every kind of line end.

    Raises
    ------
    InputError
        No such file, damaged gzip, no UTF-8, or more than `MAX_BYTES`.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig") if len(raw) <= MAX_BYTES else None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read {path}: {reason}") from error
    if text is None:
        raise InputError(f"{path} holds more than {MAX_BYTES / 2**20:.0f} MiB of text; give a part of it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def paragraphs(text: str) -> list[str]:
    """What stands between blank lines, stripped."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, from 1, and JSON object of every line of a JSON Lines file that is not blank.

    Raises
    ------
    InputError
        Unreadable file, or a line (named) that is not a JSON object, holds half of a surrogate pair, a number of thousands
        of digits, or brackets too deep.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would cut strings at U+2028 and U+0085
        if line.strip():
            yield number, _row(line, f"{path} line {number}")


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\u" in line:  # only an escape can name half of a surrogate pair, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is broken JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InputError(f"{place}: \\u{code:04x} is half of a surrogate pair, no character; remove it") from error
    except RecursionError as error:
        raise InputError(f"{place}: brackets are nested too deep; a document is a flat object of texts") from error
    except ValueError as error:  # Python's bound on digits
        raise InputError(f"{place}: a number of too many digits ({error}); write it as text") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: must be a JSON object, got {type(row).__name__}")
    return row


def need_complete(path: Path) -> None:
    """Refuse a JSON Lines file of a known schema with a hole, which a prompt would show as the word None.

    Raises
    ------
    InputError
        A key that other lines have is missing in a line, or null, or null inside (line and key are named).
    """
    found = list(rows(path))
    keys = dict.fromkeys(key for _, row in found for key in row)
    for number, row in found:
        for key in keys:
            if _has_null(row.get(key)):
                what = "null, or holds null" if key in row else "missing, though other lines have it"
                raise InputError(f"{path} line {number}: key {key!r} is {what}; give its value or leave the line out")


def _has_null(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_has_null, parts))


def read_documents(path: Path, field: str | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file; a text is split at blank lines into ``{field: paragraph}``.

    Parameters
    ----------
    path : Path
        Its name ends in one of `SUFFIXES`.
    field : str, optional
        What every row must hold a string in; ``text`` names the paragraphs if there is none.

    Raises
    ------
    InputError
        Unknown form, unreadable or empty file, or a line (named) that is broken or has no string in the field.
    """
    need_suffix(path)
    if not path.name.endswith(JSONL):
        found = [{field or "text": part} for part in paragraphs(read_text(path))]
    else:
        found = []
        for number, row in rows(path):
            if field is not None and not isinstance(row.get(field), str):
                raise InputError(f"{path} line {number}: no text in field {field!r}; it has {', '.join(row)}")
            found.append(row)
    if not found:
        raise InputError(f"{path} is empty: it must hold at least one document")
    return found
