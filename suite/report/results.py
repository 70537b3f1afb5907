"""Read a run folder into data frames; works on an unfinished run, refuses a newer schema or a broken file."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from suite import schema
from suite.errors import InputError
from suite.manifest_file import NAME as MANIFEST
from suite.manifest_file import read_manifest

# What a setting of accuracy.csv is; a column that varies within a block goes into the row's label.
BLOCK = ["model", "dtype", "scope", "mode", "sparsity_target"]
VARIANT = [column for column in schema.ACCURACY.settings if column not in (*BLOCK, "method")]
SETTING = [*BLOCK, "method", *VARIANT]
# Rows of speed.csv that share these are of one shape on one device and may be compared; backend and variant compete.
SHAPE = ["level", "model_shape", "model", "dtype", "batch_size", "threads", "context_tokens", "cache", "device_name"]
CHOICE = ["rank", "predictor", "predictor_input", "exact_projection"]  # by what a method chooses neurons, in both CSVs
LINE = ["method", *CHOICE, "backend", "variant", "clock"]  # a line over sparsities, within a shape
DECODED = "model_shape dtype batch_size context_tokens threads device_name".split()  # a model and how it decodes


@dataclass(frozen=True)
class Results:
    """One run as data frames with the columns of :mod:`suite.schema`; a file that is not there yet gives no rows.

    Numbers are float64 with NaN for an empty cell; all other columns are text with ``""``, also whole numbers that name a
    setting.
    """

    folder: Path
    accuracy: pd.DataFrame
    groups: pd.DataFrame
    samples: pd.DataFrame
    speed: pd.DataFrame
    sparsity: pd.DataFrame
    predictor: pd.DataFrame
    claims: pd.DataFrame
    equal_bytes: pd.DataFrame
    cif_caf: pd.DataFrame
    activations: pd.DataFrame
    phases: pd.DataFrame
    decode_check: pd.DataFrame
    timings: pd.DataFrame
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The run's id, else the folder's name."""
        return str(self.manifest.get("run_id") or self.folder.resolve().name)


def load_results(folder: str | Path) -> Results:
    """Load a run folder.

    Parameters
    ----------
    folder : path
        ``results/reference/<run>`` or ``results/runs/<run>``.

    Raises
    ------
    InputError
        No run folder, a newer schema than this version reads, or a file that is broken (named with line and column).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"run folder {folder}: no such folder; `countdown-suite ls runs` shows the runs there are")
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    version = int(manifest.get("schema_version", 1))
    frames = {table.name: _read(folder / table.file, table, version) for table in schema.TABLES}
    if not manifest and not any((folder / f"{name}.csv").is_file() for name in ("accuracy", "speed")):
        raise InputError(f"{folder} is not a run folder: it has neither manifest.json nor accuracy.csv nor speed.csv")
    return Results(folder=folder, manifest=manifest, **frames)


def number(value: Any) -> float | None:
    """Float of a cell, None where it is empty or not finite."""
    result = float(value)
    return result if math.isfinite(result) else None


def _read(path: Path, table: schema.Table, version: int) -> pd.DataFrame:
    if not path.is_file():
        return _typed(pd.DataFrame(columns=table.names, dtype=str), path, table)
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (
        OSError,
        EOFError,
        UnicodeDecodeError,
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        zlib.error,
    ) as error:
        raise InputError(f"{path} cannot be read as CSV: {' '.join(str(error).split())}") from error
    later = {c.name: c.before for c in table.columns if c.since > version and c.name not in frame}
    frame = frame.assign(**later)
    missing = [column for column in table.names if column not in frame]
    if "status" in table.names and not missing and (frame["status"] == "").any():
        row = int((frame["status"] == "").to_numpy().argmax())
        raise InputError(f"{path} line {row + 2}: a row without status; write the run folder again from the cell store")
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; is it of this suite?")
    return _typed(frame, path, table)


def _typed(frame: pd.DataFrame, path: Path, table: schema.Table) -> pd.DataFrame:
    for column, kind in [(c.name, "number" if c.is_number else c.kind) for c in table.columns]:
        if kind == "number":
            text = frame[column]
            number = pd.to_numeric(text.where(text != ""), errors="coerce").astype("float64")
            wrong = number.isna() & (text != "") & (text.str.lower() != "nan")
            if wrong.any():
                row = int(wrong.to_numpy().argmax())
                raise InputError(f"{path} line {row + 2}, column {column}: {text.iloc[row]!r} is not a number")
            frame[column] = number
        elif kind == "whole":  # text, but "2.0" as a spreadsheet writes it is the same as "2"
            frame[column] = frame[column].str.replace(r"^(\d+)\.0$", r"\1", regex=True)
    return frame
