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

SAMPLES_FILE = "samples.csv.gz"
# What a setting of accuracy.csv is, beside its method; a column that varies within a block goes into the row's label.
VARIANT = ["estimator", "predictor", "rank", "calibration", "seed"]
BLOCK = ["model", "dtype", "scope", "mode", "sparsity_target"]
SETTING = [*BLOCK, "method", *VARIANT]
# Rows of speed.csv that share these are of one shape on one device and may be compared; backend and variant compete.
SHAPE = ["level", "model_shape", "model", "dtype", "batch_size", "threads", "context_tokens", "cache", "device_name"]
LINE = ["method", "rank", "predictor", "backend", "variant", "clock"]  # what a line over sparsities is, within a shape
DECODED = [
    "model_shape",
    "dtype",
    "batch_size",
    "context_tokens",
    "threads",
    "device_name",
]  # a model and how it is run
# Columns of numbers; every other column is text. A missing number is NaN, a missing text is "".
_NUMBERS = frozenset(
    "sparsity_target sparsity_realized sparse_share bytes_share value stderr chance delta_dense delta_ci_low "
    "delta_ci_high n_samples elapsed_s d_model d_ff n_layers rounds latency_us_median latency_us_q25 latency_us_q75 "
    "latency_us_min jit_s capture_s launch_us tokens_per_s mlp_share bytes_read_mib read_bandwidth_gb_s efficiency "
    "peak_memory_mib extra_memory_mib max_rel_error threshold n_tokens recall precision overlap_at_k mass_kept "
    "mass_kept_ideal train_tokens loss fit_s ci_low ci_high sparsity cif_alive cif_dead caf_alive caf_dead "
    "mean q05 q25 q50 q75 q95 q99 mass_kept_at_50 mass_kept_at_70 mass_kept_at_80 mass_kept_at_90 "
    "n_choices n_gold us_median us_q05 us_q95 n_steps max_error bound kl_median kl_q95 kl_max top1_agreement".split()
)
# Whole numbers that name a setting: text, but "2.0" as a spreadsheet writes it is the same as "2".
_WHOLE = frozenset("rank num_fewshot limit batch_size seed threads context_tokens layer".split())


@dataclass(frozen=True)
class Results:
    """One run as data frames with the columns of :mod:`suite.schema`; a file that is not there yet gives no rows.

    Numbers are float64 with NaN for an empty cell; all other columns are text with ``""``.
    """

    folder: Path
    accuracy: pd.DataFrame
    samples: pd.DataFrame
    speed: pd.DataFrame
    sparsity: pd.DataFrame
    predictor: pd.DataFrame
    claims: pd.DataFrame
    cif_caf: pd.DataFrame
    activations: pd.DataFrame
    phases: pd.DataFrame
    decode_check: pd.DataFrame
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
    old = int(manifest.get("schema_version", 1)) < 2
    frames = {
        "accuracy": _read(folder / "accuracy.csv", schema.ACCURACY, old=old),
        "samples": _read(folder / SAMPLES_FILE, schema.SAMPLES, old=old),
        "speed": _read(folder / "speed.csv", schema.SPEED),
        "sparsity": _read(folder / "sparsity.csv", schema.SPARSITY),
        "predictor": _read(folder / "predictor.csv", schema.PREDICTOR),
        "claims": _read(folder / "claims.csv", schema.CLAIMS),
        "cif_caf": _read(folder / "cif_caf.csv", schema.CIF_CAF),
        "activations": _read(folder / "activations.csv", schema.ACTIVATIONS),
        "phases": _read(folder / "phases.csv", schema.PHASES),
        "decode_check": _read(folder / "decode_check.csv", schema.DECODE_CHECK),
    }
    if not manifest and not any((folder / f"{name}.csv").is_file() for name in ("accuracy", "speed")):
        raise InputError(f"{folder} is no run folder: it has neither manifest.json nor accuracy.csv nor speed.csv")
    return Results(folder=folder, manifest=manifest, **frames)


def number(value: Any) -> float | None:
    """Float of a cell, None where it is empty or not finite."""
    result = float(value)
    return result if math.isfinite(result) else None


def _read(path: Path, columns: list[str], *, old: bool = False) -> pd.DataFrame:
    if not path.is_file():
        return _typed(pd.DataFrame(columns=columns, dtype=str), path)
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
        raise InputError(f"{path} is no readable CSV: {' '.join(str(error).split())}") from error
    if old:
        frame = frame.assign(**{column: "" for column in columns if column in schema.SINCE_2 and column not in frame})
    missing = [column for column in columns if column not in frame]
    if "status" in columns and not missing and (frame["status"] == "").any():
        row = int((frame["status"] == "").to_numpy().argmax())
        raise InputError(f"{path} line {row + 2}: a row without status; write the run folder again from the cell store")
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; is it of this suite?")
    return _typed(frame, path)


def _typed(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    for column in frame.columns:
        if column in _NUMBERS:
            text = frame[column]
            number = pd.to_numeric(text.where(text != ""), errors="coerce").astype("float64")
            wrong = number.isna() & (text != "") & (text.str.lower() != "nan")
            if wrong.any():
                row = int(wrong.to_numpy().argmax())
                raise InputError(f"{path} line {row + 2}, column {column}: {text.iloc[row]!r} is not a number")
            frame[column] = number
        elif column in _WHOLE:
            frame[column] = frame[column].str.replace(r"^(\d+)\.0$", r"\1", regex=True)
    return frame
