"""Table of practical methods at equal bytes: rows methods, columns tasks, a block per model, scope and share of the bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from suite.report.equal_bytes import AVERAGE, SPEED_UP
from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.quality import Interval, Quality, cell_value
from suite.report.results import number
from suite.report.style import DENSE
from suite.report.task_names import text_title
from suite.report.text import MISSING, fixed, percent, perplexity_text, signed

_PLACE = ["model", "dtype", "scope", "bytes_share"]


def at_equal_bytes(material: Material) -> Content | None:
    """Every practical method at each level, dense above them."""
    frame = material.equal_bytes
    if frame.empty:
        return None
    timed = frame.loc[(frame["task"] == SPEED_UP) & frame["value"].notna(), "model"]
    frame = frame[(frame["task"] != SPEED_UP) | frame["model"].isin(timed)]  # no column without a value
    return Content([_block(material.quality, own) for _, own in frame.groupby(_PLACE, sort=False)])


def _block(quality: Quality, own: pd.DataFrame) -> Block:
    model, dtype, scope, level = own.iloc[0][_PLACE]
    columns = list(dict.fromkeys(zip(own["task"], own["metric"], strict=True)))
    rows, empty, reached = [_dense(quality, own, columns)], dict[str, None](), False
    for label, line in own.groupby("label", sort=False):
        found = {(row["task"], row["metric"]): row for row in line.to_dict("records")}
        rows.append(
            [
                str(label),
                _between(found[AVERAGE, ""]),
                *(text for column in columns for text in _texts(column, found[column])),
            ]
        )
        reasons = [row["reason"] for column, row in found.items() if column != (SPEED_UP, "")]
        if any(reasons):  # the perplexities' own bytes are a little different
            empty[f"{label}: {next(filter(None, reasons))}"] = None
        reached |= not all(reasons)
    header = ["method", "between", *(name for column in columns for name in _names(*column))]
    heading = f"{model}, {percent(level, 0)} % of the bytes, scope `{scope}`, {dtype}"
    return Block(header, rows if reached else [], heading, [f"Not reached: {'; '.join(empty)}."] if empty else [])


def _names(task: str, metric: str) -> list[str]:
    """Columns of a table that one of the frame fills: of the average its difference to dense, too."""
    if task == AVERAGE:
        return [AVERAGE, f"minus {DENSE}"]
    return [f"{task} ({metric})" if metric and not _is_text(metric) else text_title(f"{task} {metric}".strip())]


def _texts(column: tuple[str, str], row: Mapping[Any, Any]) -> list[str]:
    task, metric = column
    value = number(row["value"])
    if task == AVERAGE:
        return [percent(value), signed(_delta(row))]
    if task == SPEED_UP:
        return [MISSING if value is None else f"{fixed(value, 2)}x"]
    return [(MISSING if value is None else perplexity_text(value)) if _is_text(metric) else percent(value)]


def _is_text(metric: str) -> bool:
    return metric.endswith("perplexity")


def _delta(row: Mapping[Any, Any]) -> Interval | None:
    value = number(row["delta_dense"])
    return None if value is None else (value, number(row["delta_ci_low"]), number(row["delta_ci_high"]))


def _between(row: Mapping[Any, Any]) -> str:
    """Sparsities of both settings, of the task average."""
    ends = [number(row[name]) for name in ("sparsity_less", "sparsity_more")]
    known = [f"{end:g}" for end in ends if end is not None]
    return " and ".join(dict.fromkeys(known)) or MISSING


def _dense(quality: Quality, own: pd.DataFrame, columns: Sequence[tuple[str, str]]) -> list[str]:
    """The row of dense: its measured values."""
    place = {name: str(own.iloc[0][name]) for name in ("model", "dtype", "scope")}
    dense = quality.dense_of(place, quality.settings(pd.concat([quality.summary, quality.text])))
    texts = []
    for task, metric in columns:
        name = f"{task} {metric}" if _is_text(metric) else task
        value = None if dense is None else cell_value(dense.cells.get(name))
        if dense is not None and task == AVERAGE:
            value = quality.average(dense, quality.tasks_of(place))
        texts += _texts((task, metric), {"value": math.nan if value is None else value, "delta_dense": math.nan})
    return [DENSE, MISSING, *texts]


TABLES = (
    ReportTable(
        "equal_bytes",
        "Practical methods at equal bytes",
        "Every practical method at the same share of the dense MLP's bytes a token, those of its predictor, vectors and "
        "factors counted. The values are interpolated between the two neighbouring settings that were measured (`between`: "
        "their sparsities): of perplexities the logarithm is linear in the bytes, of accuracies the value. A setting's bytes "
        "are those at its realised sparsity, for accuracies the mean over the tasks of the average. Accuracies in percent; "
        "the average minus dense's in points, with its paired 95 % interval (the mean of two settings on the same documents "
        "is one of their documents, so it is as exact as theirs). Speed-up: of the time of a token, linear in the bytes, "
        "where both settings were timed in this run. "
        f"{MISSING}: not reached, extrapolated nowhere; the reason stands below.",
        at_equal_bytes,
    ),
)
