"""Reads the files of a run folder."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite import schema
from suite.errors import InputError
from suite.runs.view.manifest import read_manifest

_LONGEST_CELL = 1 << 26  # characters: the item of a document may be a long text
_TABLES = {table.file: table for table in schema.TABLES}

Row = dict[str, str]


def read_rows(folder: Path, name: str) -> list[Row]:
    """Rows of a table of a run folder; none if it is not there. Errors are those of `rows_of`."""
    return list(rows_of(folder, name))


def rows_of(folder: Path, name: str) -> Iterator[Row]:
    """Rows of a table one by one: samples.csv.gz of a large run takes a gigabyte as a list.

    Raises
    ------
    InputError
        A file that is cut off, damaged, of another table, or with rows of another length.
    """
    path = folder / name
    if not path.is_file():
        return
    csv.field_size_limit(_LONGEST_CELL)
    try:
        packed = path.suffix == ".gz"
        with (
            gzip.open(path, "rt", encoding="utf-8", newline="")
            if packed
            else path.open(encoding="utf-8", newline="") as file
        ):
            reader = csv.DictReader(file)
            lacking = [column for column in _TABLES[name].since(1) if column not in (reader.fieldnames or ())]
            for number, row in enumerate(reader, 2):
                if lacking:
                    raise InputError(f"{path} has no column {lacking[0]!r}: it is another table; run the matrix again")
                if None in row or None in row.values():
                    raise InputError(
                        f"{path} line {number}: not as many cells as columns; run the matrix again to rewrite it"
                    )
                yield row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a readable CSV: {error}; run the matrix again to rewrite it") from error


def value_of(row: Row, column: schema.Column, place: str) -> Any:
    """Value of a cell, None where it is empty.

    Raises
    ------
    InputError
        It is not there, or not of its column's kind.
    """
    try:
        return column.parse(row[column.name])
    except (KeyError, ValueError) as error:
        raise InputError(f"{place}, column {column.name}: {error}; it is not of this suite") from error


def timings_of(folder: Path) -> dict[str, list[float]]:
    """Microseconds of each round by cell, from timings.csv.gz; empty where a run has none.

    Raises
    ------
    InputError
        A file or a row that is not of this suite.
    """
    found: dict[str, list[float]] = {}
    latency = schema.TIMINGS.column("latency_us")
    for line, row in enumerate(rows_of(folder, schema.TIMINGS.file), 2):
        value = value_of(row, latency, f"{folder / schema.TIMINGS.file} line {line}")
        found.setdefault(row["cell_id"], []).append(value)
    return found


@dataclass(frozen=True)
class Run:
    """Manifest and rows of a run folder."""

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder (InputError if it is none)."""
        return cls(folder, read_manifest(folder))

    def rows(self, table: schema.Table) -> dict[tuple[str, ...], Row]:
        """Rows by what identifies a setting; a second row of the same has ``#2`` in its key, so that none is lost."""
        found: dict[tuple[str, ...], Row] = {}
        seen: Counter[tuple[str, ...]] = Counter()
        for row in read_rows(self.folder, table.file):
            key = table.key(row)
            seen[key] += 1
            found[(*key, f"#{seen[key]}" if seen[key] > 1 else "")] = row
        return found
