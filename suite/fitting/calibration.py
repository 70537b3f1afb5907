"""Text that thresholds are fitted on."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from suite.data_files import JSONL, SUFFIXES, is_file, is_folder, need_suffix, paragraphs, read_text, rows
from suite.errors import InputError, named
from suite.registry import did_you_mean

PYDOC = "pydoc"
_FILE, _TRAIN = "file:", "train:"
_TXT_DOCUMENT = 2000  # characters of a plain text that are taken as one document
_SHORT = 200  # characters; a topic with less prose is all grammar and tables
_PARAGRAPH = 100  # characters; shorter ones recur in texts that have nothing to do with each other


@dataclass(frozen=True)
class Calibration:
    """Where the text of a fit comes from.

    Parameters
    ----------
    source : str
        ``pydoc``: the English reference prose that every Python carries (`pydoc_data.topics`). ``file:PATH``: a .txt
        file, or .jsonl or .jsonl.gz with a field ``text`` or ``page``, one document a line; or a folder of such files.
        ``train:FOLDER,FOLDER ...``: the train splits of tasks, ``FOLDER/train.jsonl`` each, in the form that lm-eval
        shows to the model, with the right answer.
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
        if self.source != PYDOC and not any(self.source.startswith(k) and self.source != k for k in (_FILE, _TRAIN)):
            known = [PYDOC, "file:PATH", "train:FOLDER,FOLDER"]
            raise InputError(f"unknown calibration {self.source!r}{did_you_mean(self.source, known)}")
        if not isinstance(self.max_tokens, int) or self.max_tokens < 2:
            raise InputError(f"calibration max_tokens {self.max_tokens!r}: must be an integer of at least 2")

    def documents(self) -> list[str]:
        """Documents in the order of the source.

        Raises
        ------
        InputError
            File missing, of an unknown kind, broken at a line, or with fewer than two documents; a task without train
            split.
        """
        return list(self._documents)

    @cached_property
    def _documents(self) -> tuple[str, ...]:
        if self.source == PYDOC:
            documents = _pydoc_prose()
        elif self.source.startswith(_FILE):
            documents = _read(Path(self.source[len(_FILE) :]).expanduser())
        else:
            documents = [text for folder in self._folders for text in train_documents(folder)]
        documents = [text for text in documents if text.strip()]
        if len(documents) < 2:
            raise InputError(f"calibration {self.source}: needs at least 2 documents (to fit and to check on)")
        return tuple(documents)

    @property
    def _folders(self) -> list[Path]:
        return [Path(folder.strip()).expanduser() for folder in self.source[len(_TRAIN) :].split(",")]

    def fingerprint(self) -> str:
        """SHA-256 of the documents: not of the path, and different between Python versions for ``pydoc``."""
        return hashlib.sha256(json.dumps(self._documents).encode()).hexdigest()

    def paragraphs(self) -> frozenset[str]:
        """Fingerprints of the paragraphs, to be compared with those of evaluated documents."""
        return fingerprints(self._documents)

    @property
    def in_domain(self) -> bool:
        """Whether the text is of evaluated tasks' own train splits."""
        return self.source.startswith(_TRAIN)

    @property
    def description(self) -> str:
        """One line for reports; names no folder."""
        if self.source == PYDOC:
            return f"reference prose of pydoc_data.topics (Python {'.'.join(platform.python_version_tuple()[:2])})"
        if self.in_domain:
            names = ", ".join(folder.name for folder in self._folders)
            return f"{len(self._documents)} documents of the train splits of {names}"
        return f"{len(self._documents)} documents of {Path(self.source[len(_FILE) :]).name}"


def fingerprints(texts: Iterable[str]) -> frozenset[str]:
    """Hashes of paragraphs of at least 100 characters, without regard to case and white space."""
    found = set()
    for text in texts:
        for line in text.splitlines():
            words = " ".join(line.lower().split())
            if len(words) >= _PARAGRAPH:
                found.add(hashlib.sha256(words.encode()).hexdigest()[:24])
    return frozenset(found)


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
    if is_folder(path):
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not files:
            raise InputError(f"calibration folder {path}: no file that ends in {', '.join(SUFFIXES)}")
        return [text for file in files for text in _read(file)]
    with named("calibration file"):
        need_suffix(path)
        return _jsonl(path) if path.name.endswith(JSONL) else _pieces(read_text(path))


def _pieces(text: str) -> list[str]:
    """Runs of whole paragraphs, each at least `_TXT_DOCUMENT` characters long but for the last."""
    pieces: list[str] = [""]
    for paragraph in paragraphs(text):
        if len(pieces[-1]) >= _TXT_DOCUMENT:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]}\n\n{paragraph}".strip()
    return pieces


def _jsonl(path: Path) -> list[str]:
    documents = []
    for number, record in rows(path):
        value = record.get("text", record.get("page"))
        if not isinstance(value, str):
            raise InputError(f"{path} line {number}: no field 'text' or 'page' with a string")
        documents.append(value)
    return documents


def train_documents(folder: Path) -> list[str]:
    """Documents of a task's train split: questions with their right answers.

    Raises
    ------
    InputError
        No train split, or a row of a schema that is not known.
    """
    path = next((file for file in (folder / "train.jsonl", folder / "train.jsonl.gz") if is_file(file)), None)
    if path is None:
        raise InputError(f"calibration train:{folder}: task {folder.name} has no train split; name another source")
    documents = []
    with named("calibration file"):
        for number, record in rows(path):
            try:
                documents.append(_shown(record))
            except (KeyError, ValueError, IndexError, TypeError) as error:
                raise InputError(f"{path} line {number}: not the schema of a known task ({error})") from error
    return documents


def _shown(row: Mapping[str, Any]) -> str:
    """A row as text, by its fields (data sets of ARC, OpenBookQA, WinoGrande, PIQA, GSM8K; else field text or page)."""
    if "choices" in row and "answerKey" in row:
        answer = _string(row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))
        return (
            f"{_string(row, 'question_stem')} {answer}"
            if "question_stem" in row
            else f"Question: {_string(row, 'question')}\nAnswer: {answer}"
        )
    if "sentence" in row:
        return _string(row, "sentence").replace("_", _string(row, f"option{int(row['answer'])}"))
    if "goal" in row:
        return f"Question: {_string(row, 'goal')}\nAnswer: {_string(row, 'sol2' if int(row['label']) else 'sol1')}"
    if "question" in row:
        return f"Question: {_string(row, 'question')}\nAnswer: {_string(row, 'answer')}"
    return _string(row, "text" if "text" in row else "page")


def _string(values: Any, key: str | int) -> str:
    """A field that must hold a string: null would be fitted on as the word None."""
    if not isinstance(value := values[key], str):
        raise TypeError(f"{key!r} is {json.dumps(value)}")
    return value
