"""Writes a run folder, a view of the store: CSVs with rows sorted by what they are, and paired differences to dense."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from suite import schema
from suite.errors import InputError
from suite.methods.base import NEURONS
from suite.methods.cost import share_of_sites
from suite.registry import method_class
from suite.runs.cells.accuracy import AccuracyCell
from suite.runs.cells.matrix import Matrix
from suite.runs.store import Record
from suite.runs.view.aggregates import aggregate_rows
from suite.runs.view.pairs import paired
from suite.runs.view.scrub import Scrubber
from suite.statistics import paired_delta, paired_delta_of_resampled

Row = dict[str, Any]
_OF_THE_KEY = ("device_name", "driver_version")  # measured rows have them too, the driver of a CPU as ""
_NOT_RUN = {"status": "missing", "reason": "not run yet: run the same command again"}


def table_bytes(table: schema.Table, rows: Iterable[Mapping[str, Any]]) -> bytes:
    """File of a table, with a header; compressed without a time, so that equal content gives equal files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.names)
    writer.writerows([column.text(row.get(column.name)) for column in table.columns] for row in rows)
    data = text.getvalue().encode()
    return gzip.compress(data, 6, mtime=0) if table.file.endswith(".gz") else data


class Assembly:
    """CSV files of a run from its cells and their records.

    Parameters
    ----------
    run_id : str
    matrix : its cells
    records : record or None by key
    scrub : takes the paths of this machine out of reasons
    """

    def __init__(
        self,
        run_id: str,
        matrix: Matrix,
        records: Mapping[str, Record | None],
        scrub: Scrubber,
    ) -> None:
        self._run_id, self._accuracy, self._speed = run_id, matrix.accuracy, matrix.speed
        self._analysis, self._cells, self._groups = matrix.analysis, matrix.cells, matrix.groups
        self._records, self._scrub = records, scrub
        self._samples: dict[str, dict[str, dict[str, float]]] = {}
        self._dense = {cell.base: cell for cell in matrix.accuracy if cell.mode == "none"}

    def files(self) -> dict[str, bytes]:
        """Content of the CSVs and the logs of failed cells; those of the analysis only where the matrix has one."""
        accuracy = {cell.id: self._rows_of(cell) for cell in self._accuracy}
        tables: list[tuple[schema.Table, Iterable[Row]]] = [
            (schema.ACCURACY, schema.ACCURACY.sorted(chain.from_iterable(accuracy.values()))),
            (schema.SAMPLES, self._sample_rows()),
            (schema.SPARSITY, self._sparsity_rows()),
            (schema.SPEED, schema.SPEED.sorted(self._speed_rows())),
        ]
        if self._analysis:
            tables += [(table, self._analysis_rows(table)) for table in (schema.CIF_CAF, schema.ACTIVATIONS)]
        of_some_runs = [(schema.GROUPS, self._group_rows(accuracy)), (schema.PREDICTOR, self._predictor_rows())]
        of_some_runs += [(t, self._parts_of_rows(t.name)) for t in (schema.PHASES, schema.TIMINGS, schema.DECODE_CHECK)]
        tables += [(table, rows) for table, rows in of_some_runs if rows]
        return self._logs() | {table.file: table_bytes(table, rows) for table, rows in tables}

    def _logs(self) -> dict[str, bytes]:
        logs = {}
        for cell in self._cells:
            record = self._records[cell.key]
            if record is not None and record["log"]:
                logs[f"logs/{cell.id}.txt"] = f"{cell.label}\n{self._scrub.text(record['log'])}".encode()
        return logs

    def _group_rows(self, accuracy: Mapping[str, Sequence[Row]]) -> list[Row]:
        found: list[Row] = []
        for one in self._groups:
            samples = {cell.id: self._samples_of(cell) for cell in (*one.cells, *one.dense)}
            found += aggregate_rows(one, accuracy, samples)
        return schema.GROUPS.sorted(found)

    def _rows_of(self, cell: AccuracyCell) -> list[Row]:
        record = self._records[cell.key]
        common = self._identity(cell)
        if record is None:
            return [common | _NOT_RUN]
        common |= {
            "status": record["status"],
            "reason": self._scrub.text(record["reason"]),
            "elapsed_s": record["elapsed_s"],
        }
        if record["status"] != "ok":
            return [common]
        common |= {"sparsity_realized": _realised(cell, record), "bytes_share": _bytes_share(cell, record)}
        return [common | row | self._delta(cell, row) for row in record["rows"]]

    def _identity(self, cell: AccuracyCell) -> Row:
        found = {"run_id": self._run_id, **cell.columns}
        return found | {name: self._scrub.text(found[name]) for name in ("calibration", "chat") if found[name]}

    def _delta(self, cell: AccuracyCell, row: Row) -> Row:
        """Paired difference to the dense cell of the same model and task, with its interval; empty for dense itself."""
        dense = self._dense.get(cell.base)
        record = self._records[dense.key] if dense else None
        if dense is None or record is None or record["status"] != "ok" or cell.mode == "none":
            return {}
        if row.get("aggregation"):
            return self._resampled_delta(cell, dense, row)
        metric = str(row["metric"])
        pair = paired(self._samples_of(cell), self._samples_of(dense), metric, str(row.get("filter")))
        if pair is None:
            return {}
        own, base = zip(pair.values, pair.weights, strict=True)
        delta, low, high = paired_delta(*own, *base, metric, pair.groups)
        return {"delta_dense": delta, "delta_ci_low": low, "delta_ci_high": high}

    def _resampled_delta(self, cell: AccuracyCell, dense: AccuracyCell, row: Row) -> Row:
        """The same where an aggregation makes the value: resampled when the cells ran, both on the same documents."""
        record = self._records[dense.key]
        same = ("metric", "filter", "aggregation", "n_samples")
        base = [r for r in record["rows"] if all(r.get(c) == row.get(c) for c in same)] if record else []
        if not base or self._documents_of(cell) != self._documents_of(dense):
            return {}
        found = paired_delta_of_resampled(
            row["value"], row.get("resampled"), base[0]["value"], base[0].get("resampled")
        )
        return dict(zip(("delta_dense", "delta_ci_low", "delta_ci_high"), found, strict=True))

    def _documents_of(self, cell: AccuracyCell) -> list[list[str]]:
        record = self._records[cell.key]
        return [sample[:2] for sample in record["samples"]] if record else []

    def _samples_of(self, cell: AccuracyCell) -> dict[str, dict[str, float]]:
        """Value by document by metric; a metric whose documents come twice (two filters) is left out."""
        if cell.key not in self._samples:
            record = self._records[cell.key]
            found: dict[str, dict[str, float]] = {}
            twice = set()
            for document, metric, value in record["samples"] if record else []:
                if isinstance(value, str):  # an item, which only its aggregation understands
                    continue
                values = found.setdefault(metric, {})
                if document in values:
                    twice.add(metric)
                values[document] = value
            self._samples[cell.key] = {metric: values for metric, values in found.items() if metric not in twice}
        return self._samples[cell.key]

    def _sample_rows(self) -> Iterable[Row]:
        for cell in sorted(self._accuracy, key=lambda cell: cell.id):
            record = self._records[cell.key]
            if record is not None and record["status"] == "ok":
                choices = record.get("choices", {})
                for document, metric, value in record["samples"]:
                    n_choices, n_gold = choices.get(document, (None, None))
                    yield {
                        "cell_id": cell.id,
                        "task": cell.task.name,
                        "doc_id": document,
                        "metric": metric,
                        "item" if isinstance(value, str) else "value": value,
                        "n_choices": n_choices,
                        "n_gold": n_gold,
                    }

    def _sparsity_rows(self) -> Iterable[Row]:
        for cell in sorted(self._accuracy, key=lambda cell: cell.id):
            record = self._records[cell.key]
            if record is not None and record["status"] == "ok":
                for layer in sorted(record["sparsity"], key=lambda layer: layer["layer"]):
                    common = {"cell_id": cell.id, "sparsity_target": cell.sparsity, "site": NEURONS}  # of old cells
                    yield common | layer

    def _analysis_rows(self, table: schema.Table) -> list[Row]:
        """Rows of one file of the analysis; of both files' rows those that have its settings."""
        rows = []
        for cell in self._analysis:
            record = self._records[cell.key]
            if record is not None and record["status"] == "ok":
                name = {"model": cell.model_name, "dtype": cell.dtype}
                rows += [name | row for row in record["rows"] if set(table.identity) <= {*name, *row}]
        return table.sorted(rows)

    def _predictor_rows(self) -> list[Row]:
        """Rows of every predictor once, however many cells used it."""
        found: dict[str, list[Row]] = {}
        for cell in self._accuracy:
            record = self._records[cell.key]
            if cell.fit_key and record is not None and record.get("predictor"):
                common = {"fit_id": cell.fit_key[:16], "model": cell.model_name}
                found.setdefault(cell.fit_key, [common | row for row in record["predictor"]])
        return [row for key in sorted(found) for row in found[key]]

    def _speed_rows(self) -> list[Row]:
        rows = []
        for cell in self._speed:
            record = self._records[cell.key]
            fields = {"run_id": self._run_id, **cell.columns}
            if record is None:
                rows.append(fields | _NOT_RUN)
                continue
            measured = _measured(cell.label, fields, record["rows"][0] if record["rows"] else {})
            status = {"status": record["status"], "reason": self._scrub.text(record["reason"])}
            rows.append(fields | measured | status)
        return rows

    def _parts_of_rows(self, name: str) -> list[Row]:
        """Rows that belong to a speed row: phases, in their own order; its rounds; what the check of a decode row found."""
        found: list[Row] = []
        for cell in sorted(self._speed, key=lambda cell: cell.id):
            record = self._records[cell.key]
            measured = record["rows"][0] if record is not None and record["rows"] else {}
            parts = measured.get(name) or []
            if name == "timings":
                parts = [{"round": number, "latency_us": latency} for number, latency in enumerate(parts)]
            found += [{"cell_id": cell.id, **part} for part in ([parts] if isinstance(parts, dict) else parts)]
        return found


def _measured(label: str, fields: Row, row: Row) -> Row:
    """What a timing adds to the fields of its cell: all but the device, whose driver the key alone knows on a CPU.

    None on either side is not an answer: a GPU row has no threads, and a predictor's rank may be known only once it is made.

    Raises
    ------
    InputError
        The row says of the case something else than its key.
    """
    row = {name: value for name, value in row.items() if name not in _OF_THE_KEY}
    for name in fields.keys() & row.keys():
        if fields[name] is not None and row[name] is not None and fields[name] != row[name]:
            raise InputError(
                f"stored cell of {label}: {name} {row[name]!r} was measured, its key says {fields[name]!r}; "
                "run it again with --rerun all"
            )
    return row


def _realised(cell: AccuracyCell, record: Record, site: str | None = None) -> float | None:
    """Mean over layers, of one site or all, of the realised sparsity; 0 for dense, None where no token was in scope."""
    if cell.mode == "none":
        return 0.0
    layers = [one for one in record["sparsity"] if site in (None, one.get("site", NEURONS))]
    found = [one["sparsity_realized"] for one in layers if one["sparsity_realized"] is not None]
    return sum(found) / len(found) if found else None


def _bytes_share(cell: AccuracyCell, record: Record) -> float | None:
    """MLP bytes per token over dense at the realised sparsity, those of a predictor or of a fit's vectors added."""
    if cell.mode == "none":
        return 1.0
    method = method_class(cell.method)
    realised = {site: share for site in method.sites if (share := _realised(cell, record, site)) is not None}
    if not realised:
        return None
    return share_of_sites(method, realised) + record["rows"][0].get("predictor_share", 0.0)
