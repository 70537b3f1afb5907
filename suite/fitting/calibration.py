"""Text that thresholds are fitted on."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from suite.errors import InputError
from suite.registry import did_you_mean

PYDOC = "pydoc"
_FILE = "file:"
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
_TXT_DOCUMENT = 2000  # characters of a plain text that are taken as one document
_SHORT = 200  # characters; a topic with less prose is all grammar and tables


@dataclass(frozen=True)
class Calibration:
    """Where the text of a fit comes from.

    Parameters
    ----------
    source : str
        ``pydoc``: the English reference prose that every Python carries (`pydoc_data.topics`); ``file:PATH``: a .txt
        file, or .jsonl or .jsonl.gz with the field ``text``, one document a line.
    max_tokens : int
        Tokens that a fit takes of it, held-out ones included.

    Raises
    ------
    InputError
        Unknown source, or fewer than 2 tokens.
    """

    source: str = PYDOC
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.source != PYDOC and not (self.source.startswith(_FILE) and self.source != _FILE):
            raise InputError(f"unknown calibration {self.source!r}{did_you_mean(self.source, [PYDOC, 'file:PATH'])}")
        if not isinstance(self.max_tokens, int) or self.max_tokens < 2:
            raise InputError(f"calibration max_tokens {self.max_tokens!r}: must be an integer of at least 2")

    def documents(self) -> list[str]:
        """Documents in the order of the source.

        Raises
        ------
        InputError
            File missing, of an unknown kind, broken at a line, or with fewer than two documents.
        """
        return list(self._documents)

    @cached_property
    def _documents(self) -> tuple[str, ...]:
        documents = _pydoc_prose() if self.source == PYDOC else _read(Path(self.source[len(_FILE) :]).expanduser())
        documents = [text for text in documents if text.strip()]
        if len(documents) < 2:
            raise InputError(f"calibration {self.source}: needs at least 2 documents (to fit and to check on)")
        return tuple(documents)

    def fingerprint(self) -> str:
        """SHA-256 of the documents: not of the path, and different between Python versions for ``pydoc``."""
        return hashlib.sha256(json.dumps(self._documents).encode()).hexdigest()

    @property
    def in_domain(self) -> bool:
        """Whether the text is of the evaluated tasks' own train splits; never for these sources."""
        return False

    @property
    def description(self) -> str:
        """One line for reports; names no folder."""
        if self.source == PYDOC:
            return f"reference prose of pydoc_data.topics (Python {'.'.join(platform.python_version_tuple()[:2])})"
        return f"{len(self._documents)} documents of {Path(self.source[len(_FILE) :]).name}"


def _pydoc_prose() -> list[str]:
    from pydoc_data.topics import topics

    prose = [_prose(text) for _, text in sorted(topics.items())]
    return [text for text in prose if len(text) >= _SHORT]


def _prose(text: str) -> str:
    """Paragraphs of running text: no headings, grammar, code or tables; hard line breaks undone."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if line.strip()]
        if not lines or any(re.fullmatch(r"\s*[*=~^+|-]{3,}.*", line) for line in lines):
            continue  # a heading with its rule, or a table
        paragraph = " ".join(line.strip() for line in lines)
        if paragraph.endswith(".") and "::=" not in paragraph:  # code and grammar do not end like sentences
            kept.append(re.sub(r"[*`]+", "", paragraph))
    return "\n\n".join(kept)


def _read(path: Path) -> list[str]:
    if not path.name.endswith(_SUFFIXES):
        raise InputError(f"calibration file {path}: must end in {', '.join(_SUFFIXES)}")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"calibration file {path} cannot be read: {error}") from error
    return _pieces(text) if path.suffix == ".txt" else _jsonl(path, text)


def _pieces(text: str) -> list[str]:
    """Runs of whole paragraphs, each at least `_TXT_DOCUMENT` characters long but for the last."""
    pieces: list[str] = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        if len(pieces[-1]) >= _TXT_DOCUMENT:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]}\n\n{paragraph.strip()}".strip()
    return pieces


def _jsonl(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"calibration file {path}, line {number}: no JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f"calibration file {path}, line {number}: no field 'text' with a string")
        documents.append(record["text"])
    return documents
