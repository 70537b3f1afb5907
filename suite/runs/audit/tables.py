"""Whether the tables of a run folder follow from its samples, its sparsity.csv and the key fields in its manifest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from suite import schema
from suite.errors import InputError
from suite.evaluation.results import WEIGHT
from suite.runs.cells.accuracy import base_of
from suite.runs.view.manifest import key_fields
from suite.runs.view.read import Row, read_rows, rows_of, timings_of, value_of
from suite.speed.case import time_columns
from suite.statistics import resampling_group, standard_error, statistic

# A value is printed with 10 digits, and samples with all: their sums agree to what the printing cut off.
RELATIVE = 1e-8
Samples = Mapping[tuple[str, str], Mapping[str, float]]


def table_problems(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Rows that are not of the manifest's cells, and columns that samples and sparsity.csv do not give.

    Raises
    ------
    InputError
        A file that is not a readable table.
    """
    rows = read_rows(folder, "accuracy.csv")
    problems = list(_accuracy_problems(rows, read_samples(folder), _layers(folder), manifest))
    if (folder / "groups.csv").exists():
        problems += _group_problems(read_rows(folder, "groups.csv"), rows)
    for name, kind in (("accuracy.csv", "accuracy"), ("speed.csv", "speed")):
        found = rows if name == "accuracy.csv" else read_rows(folder, name)
        problems += _count_problems(name, found, manifest, kind)
        for number, row in enumerate(found, 2):
            place = f"{name} line {number}"
            cell = manifest["cells"].get(row["cell_id"])
            if cell is None or cell["status"] != row["status"]:
                problems.append(f"{place}: cell {row['cell_id']} is not in the manifest, or has another status there")
            else:
                problems += _identity_problems(place, row, key_fields(manifest, row["cell_id"]), manifest)
    return problems + _timing_problems(folder)


def _timing_problems(folder: Path) -> list[str]:
    """Quartiles of speed.csv that do not follow from the rounds, where those are there."""
    timings, problems = timings_of(folder), []
    rows = {row["cell_id"]: (number, row) for number, row in enumerate(read_rows(folder, "speed.csv"), 2)}
    for cell_id, latencies in timings.items():
        number, row = rows.get(cell_id, (0, {}))
        if row.get("status") != "ok":
            problems.append(f"{schema.TIMINGS.file}: cell {cell_id} has no time in speed.csv")
            continue
        for column, expected in time_columns(latencies).items():
            found = row[column]
            if column not in ("status", "reason") and not _same(found, expected):
                problems.append(
                    f"speed.csv line {number}: {column} is {found or 'empty'}, its rounds give {expected:.10g}"
                )
    return problems


class SampleFile(NamedTuple):
    """samples.csv.gz: values by document, and items as JSON, by (cell, metric); chance of each document by cell."""

    values: dict[tuple[str, str], dict[str, float]]
    items: dict[tuple[str, str], list[str]]
    chances: dict[str, dict[str, float]]


def read_samples(folder: Path) -> SampleFile:
    """Read samples.csv.gz.

    Raises
    ------
    InputError
        A file or a row that is not of this suite.
    """
    found = SampleFile({}, {}, {})
    names = ("value", "n_choices", "n_gold")
    numbers = [schema.SAMPLES.column(name) for name in names]
    for line, row in enumerate(rows_of(folder, schema.SAMPLES.file), 2):
        place = f"{folder / schema.SAMPLES.file} line {line}"
        value, n_choices, n_gold = (value_of(row, c, place) if c.name in row else None for c in numbers)
        key = row["cell_id"], row["metric"]
        if n_choices is not None:
            if not n_choices or n_gold is None:
                raise InputError(f"{place}: {n_gold} of {n_choices} choices are right; it is not of this suite")
            found.chances.setdefault(key[0], {})[row["doc_id"]] = n_gold / n_choices
        if row.get("item"):
            found.items.setdefault(key, []).append(row["item"])
        elif value is None:
            raise InputError(f"{place}: it has neither value nor item; it is not of this suite")
        else:
            found.values.setdefault(key, {})[row["doc_id"]] = value
    return found


def _layers(folder: Path) -> dict[str, list[Row]]:
    layers: dict[str, list[Row]] = {}
    for row in read_rows(folder, "sparsity.csv"):
        layers.setdefault(row["cell_id"], []).append(row)
    return layers


def _number(row: Row, column: str, place: str) -> float | None:
    """Number of a column of accuracy.csv, or of the same column elsewhere."""
    found: float | None = value_of(row, schema.ACCURACY.column(column), place)
    return found


def _differs(place: str, row: Row, column: str, expected: float | None, why: str) -> list[str]:
    found = _number(row, column, place)
    same = found is None and expected is None
    if found is not None and expected is not None:
        same = math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=1e-9)
    text = "nothing" if expected is None else f"{expected:.10g}"
    return [] if same else [f"{place}: {row['metric']}: {column} is {row[column] or 'empty'}, {why} {text}"]


def _count_problems(name: str, rows: Sequence[Row], manifest: Mapping[str, Any], kind: str) -> list[str]:
    """Cells without a row, and rows that come twice."""
    counts = Counter((row["cell_id"], row.get("metric", ""), row.get("filter", "")) for row in rows)
    problems = [f"{name}: cell {' '.join(key)} stands in {n} rows" for key, n in counts.items() if n > 1]
    present = {row["cell_id"] for row in rows}
    missing = [c for c, cell in manifest["cells"].items() if cell["kind"] == kind and c not in present]
    return problems + [f"{name}: cell {cell} of the manifest has no row" for cell in missing]


def _identity_problems(place: str, row: Row, fields: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Columns that name the setting against the key fields, which the cell's id is the hash of."""
    table = schema.ACCURACY if fields["kind"] == "accuracy" else schema.SPEED
    known_by = [name for name in table.named if name in fields and name in row]
    expected = {name: fields[name] for name in known_by if fields[name] is not None}
    if expected.get("threads") == 0:  # a row of a GPU has none
        expected["threads"] = ""
    expected |= {"sparsity_target": fields.get("sparsity", 0.0)}
    if fields["kind"] == "accuracy":
        task, params = fields["task"], fields["params"]
        expected |= {"task": task["name"], "data_fingerprint": task["data"], "limit": task["limit"] or ""}
        expected |= {"fit_id": (fields["fit"] or "")[:16]}
        if fields["fit"] is None:
            expected["seed"] = params.get("seed", fields["seed"])
        else:  # the fit's own, which its key alone knows
            expected.pop("seed")
        known = manifest.get("models", {}).get(row["model"], {}).get("weights")
        expected |= {} if known == fields["weights"] else {"model": "that of its weights"}
    problems = []
    for column, value in expected.items():
        if not _same(row.get(column, ""), value):
            problems.append(f"{place}: {column} is {row.get(column)!r}, its cell's key says {value!r}")
    return problems


def _same(text: str, value: Any) -> bool:
    if isinstance(value, str):
        return text == value
    try:
        return math.isclose(float(text), float(value), rel_tol=RELATIVE)
    except (TypeError, ValueError):
        return False


def _accuracy_problems(
    rows: Sequence[Row],
    file: SampleFile,
    layers: Mapping[str, Sequence[Row]],
    manifest: Mapping[str, Any],
) -> Iterator[str]:
    metrics: dict[str, set[str]] = {}
    for cell_id, metric in (*file.values, *file.items):
        if not metric.endswith(WEIGHT):
            metrics.setdefault(cell_id, set()).add(metric)
    dense = _dense_cells(manifest)
    chances: dict[tuple[str, ...], str] = {}
    for number, row in enumerate(rows, 2):
        place, cell_id = f"accuracy.csv line {number}", row["cell_id"]
        if row["status"] != "ok" or cell_id not in manifest["cells"]:
            continue
        held = file.items if row.get("aggregation") else file.values
        name = next((m for m in (f"{row['metric']},{row['filter']}", row["metric"]) if (cell_id, m) in held), None)
        yield from _realised_problems(place, row, layers.get(cell_id, []))
        fields = key_fields(manifest, cell_id)  # each seed draws other documents where there is a limit
        same_task = (repr(sorted(fields["task"].items())), str(fields["seed"]), row["metric"], row["filter"])
        chance = chances.setdefault(same_task, row["chance"])
        if chance != row["chance"]:
            yield f"{place}: chance is {row['chance'] or 'empty'}, other rows of {row['task']} have {chance or 'none'}"
        if name is None:
            yield f"{place}: {row['metric']} has no samples"
            continue
        metrics[cell_id].discard(name)
        if row["chance"] and (found := file.chances.get(cell_id)):
            yield from _differs(place, row, "chance", sum(found.values()) / len(found), "its choices give")
        if row.get("aggregation"):
            yield from _item_problems(place, row, file.items[cell_id, name])
            continue
        yield from _sample_problems(place, row, file.values, name, dense.get(_base(manifest, cell_id)))
    for cell_id, left in metrics.items():
        if left:
            yield f"samples.csv.gz: {', '.join(sorted(left))} of cell {cell_id} has no row in accuracy.csv"


def _base(manifest: Mapping[str, Any], cell_id: str) -> str:
    return base_of(key_fields(manifest, cell_id))


def _dense_cells(manifest: Mapping[str, Any]) -> dict[str, str]:
    cells = {c: key_fields(manifest, c) for c, cell in manifest["cells"].items() if cell["kind"] == "accuracy"}
    return {_base(manifest, c): c for c, fields in cells.items() if fields["mode"] == "none"}


def _item_problems(place: str, row: Row, items: Sequence[str]) -> Iterator[str]:
    """Count and value of a metric that lm-eval's aggregation makes of items; a task's own function is not run."""
    from suite.evaluation.metrics import FAILURES, aggregate_items  # imports lm_eval

    yield from _differs(place, row, "n_samples", len(items), "its samples are")
    try:
        value = aggregate_items(row["aggregation"], items)
    except FAILURES as error:
        yield f"{place}: {row['metric']}: its items cannot be aggregated: {type(error).__name__} {error}"
        return
    if value is not None:
        yield from _differs(place, row, "value", value, "its samples give")


def _sample_problems(place: str, row: Row, samples: Samples, name: str, dense: str | None) -> Iterator[str]:
    """Count, value, standard error and difference to dense, from the samples."""
    cell_id, metric = row["cell_id"], row["metric"]
    own = samples[cell_id, name]
    yield from _differs(place, row, "n_samples", len(own), "its samples are")
    weights = samples.get((cell_id, name + WEIGHT), {})
    values, loads = list(own.values()), [weights.get(d, 1.0) for d in own]
    groups = [resampling_group(d) for d in own]
    value = statistic(values, loads, metric)
    yield from _differs(place, row, "value", value, "its samples give")
    yield from _differs(place, row, "stderr", standard_error(values, loads, metric, groups), "its samples give")
    base = samples.get((dense, name), {}) if dense is not None and dense != cell_id else {}
    delta = None
    if base and base.keys() == own.keys():
        base_weights = samples.get((str(dense), name + WEIGHT), {})
        delta = value - statistic([base[d] for d in own], [base_weights.get(d, 1.0) for d in own], metric)
    yield from _differs(place, row, "delta_dense", delta, "the samples give")
    low, high = _number(row, "delta_ci_low", place), _number(row, "delta_ci_high", place)
    if low is not None and high is not None and low > high:
        yield f"{place}: {metric}: delta_ci_low is above delta_ci_high"


def _group_problems(groups: Sequence[Row], rows: Sequence[Row]) -> Iterator[str]:
    """Averages of groups against the rows of their tasks."""
    by_metric: dict[tuple[str, str, str], list[Row]] = {}
    by_cell: dict[str, Row] = {}
    for row in rows:
        by_metric.setdefault((row["cell_id"], row["metric"], row["filter"]), []).append(row)
        by_cell.setdefault(row["cell_id"], row)
    for number, row in enumerate(groups, 2):
        place, cells = f"groups.csv line {number}", row["cell_ids"].split()
        unknown = [cell for cell in cells if cell not in by_cell]
        if unknown or not cells:
            yield f"{place}: cell {unknown[0] if unknown else ''} has no row in accuracy.csv"
            continue
        for name in schema.GROUPS.settings:
            if any(by_cell[cell][name] != row[name] for cell in cells):
                yield f"{place}: {name} is {row[name]!r}, not that of its cells"
        all_ok = {by_cell[cell]["status"] for cell in cells} == {"ok"}
        if all_ok != (row["status"] == "ok"):
            yield f"{place}: status is {row['status']}, its cells are {'all' if all_ok else 'not all'} ok"
        if not all_ok:
            continue
        found = [one for cell in cells for one in by_metric.get((cell, row["metric"], row["filter"]), [])]
        yield from _average_problems(place, row, found)


def _average_problems(place: str, row: Row, found: Sequence[Row]) -> Iterator[str]:
    from suite.evaluation.groups import average, average_error

    by_size = row["weight_by_size"] == "true"
    sizes = [int(_number(one, "n_samples", place) or 0) for one in found]
    if not found or not sum(sizes):
        yield f"{place}: {row['metric']} is of none of its cells"
        return
    for name in ("value", "stderr", "chance", "delta_dense"):
        made = average_error if name == "stderr" else average
        number = made([_number(one, name, place) for one in found], sizes, by_size=by_size)
        yield from _differs(place, row, name, number, "its tasks give")
    yield from _differs(place, row, "n_samples", sum(sizes), "its tasks have")


def _realised_problems(place: str, row: Row, layers: Sequence[Row]) -> Iterator[str]:
    found = [value for one in layers if (value := _number(one, "sparsity_realized", "sparsity.csv")) is not None]
    mean = 0.0 if row["mode"] == "none" else sum(found) / len(found) if found else None
    yield from _differs(place, row, "sparsity_realized", mean, "sparsity.csv gives")
