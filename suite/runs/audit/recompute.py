"""Sampled cells of a run folder, measured again."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import schema
from suite.config import MatrixConfig
from suite.fitting.calibration import PYDOC
from suite.runs.audit.compare import changed
from suite.runs.audit.tables import RELATIVE
from suite.runs.cells.accuracy import AccuracyCell, expand
from suite.runs.cells.base import World
from suite.runs.cells.matrix import Matrix
from suite.runs.runner import Runner, Say
from suite.runs.store import CellStore, canonical
from suite.runs.view.manifest import key_fields, read_manifest
from suite.runs.view.read import Row, read_rows
from suite.runs.work.base import Worker

# Of the settings in a row, those that a predictor's fit stands for; of thresholds only the calibration.
_OF_THE_FIT = ("predictor", "rank", "predictor_input", "calibration")


def recompute(
    folder: Path, config: MatrixConfig, world: World, worker: Worker, n_cells: int, say: Say, seed: int = 0
) -> list[str]:
    """Measure sampled accuracy cells again, in a store of their own, and compare with the folder's rows.

    Returns
    -------
    list of problems; a cell whose key has changed since is measured all the same, and what changed is said.
    """
    manifest = read_manifest(folder)
    rows: dict[tuple[str, ...], list[Row]] = {}
    for row in read_rows(folder, "accuracy.csv"):
        if row["status"] == "ok":
            rows.setdefault(_row_identity(row, key_fields(manifest, row["cell_id"])), []).append(row)
    cells = [cell for cell in expand(config, world) if _identity(cell) in rows]
    chosen = random.Random(seed).sample(cells, min(n_cells, len(cells)))
    problems = []
    with tempfile.TemporaryDirectory() as temporary:
        store = CellStore(Path(temporary))
        Runner(Matrix(chosen, []), worker, store, Path(temporary) / "fits", say=say).run()
        for cell in chosen:
            old = rows[_identity(cell)]
            if old[0]["cell_id"] != cell.id:
                fields = changed(key_fields(manifest, old[0]["cell_id"]), cell.key_fields)
                say(f"{cell.label}: its key has changed since: {', '.join(fields)}")
            record = store.get(cell.key)
            new = record["rows"] if record is not None and record["status"] == "ok" else []
            problems += _differences(cell, old, new)
    say(f"{len(chosen)} cells measured again")
    return problems


def _differences(cell: AccuracyCell, old: Sequence[Row], new: Sequence[Mapping[str, Any]]) -> list[str]:
    values = {(row["metric"], row["filter"]): float(row["value"]) for row in new}
    problems = []
    for row in old:
        value = values.get((row["metric"], row["filter"]))
        if value is None or not math.isclose(value, float(row["value"]), rel_tol=RELATIVE, abs_tol=1e-9):
            problems.append(f"{cell.label} {row['metric']}: was {row['value']}, is {value}")
    return problems


def _identity(cell: AccuracyCell) -> tuple[str, ...]:
    table = schema.ACCURACY
    row = {name: table.column(name).text(value) for name, value in cell.columns.items()}
    return _row_identity(row, cell.key_fields)


def _row_identity(row: Row, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The setting and the task as it was asked for, wherever its data are found.

    A setting may have fits of several predictors, texts and seeds: they are told apart by their keys, but for thresholds on
    pydoc, whose key is another one with another Python. A rank without a predictor is the method's own parameter.
    """
    by_key = row["predictor"] or row["calibration"] != PYDOC
    fit = [row["fit_id"]] if by_key else [row[name] for name in _OF_THE_FIT if name != "calibration"]
    task = canonical({name: value for name, value in fields["task"].items() if name not in ("data", "source")})
    return (*(row[name] for name in schema.ACCURACY.settings if name not in _OF_THE_FIT), *fit, task)
