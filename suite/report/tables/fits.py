"""Fits beside the main ones: spread over seeds, and calibration on the tasks' own train splits against other text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.quality import PERPLEXITIES, Average, Interval, Quality, cell_value
from suite.report.results import SETTING
from suite.report.task_names import task_order
from suite.report.text import MISSING, fixed, percent, signed

Group = list[Average]


def _grouped(quality: Quality, rows: pd.DataFrame, apart: str) -> list[Group]:
    """Settings that differ in one column alone, where there are several: for seeds of one text, for texts of one seed."""
    groups: dict[tuple[Any, ...], Group] = {}
    for one in quality.settings(rows):
        if not one.is_dense:
            groups.setdefault(tuple(one.setting[c] for c in SETTING if c != apart), []).append(one)
    return [group for group in groups.values() if len(group) > 1]


def _common(group: Sequence[Average]) -> list[str]:
    """Columns that every setting of a group has a value in."""
    shared = [{task for task, cell in one.cells.items() if cell_value(cell) is not None} for one in group]
    return sorted(set.intersection(*shared), key=lambda column: task_order(column.partition(" ")[0]))


def _texts(quality: Quality) -> pd.DataFrame:
    rows = quality.text_of(quality.every)
    return rows[rows["metric"].isin(PERPLEXITIES)]


def seeds(material: Material) -> Content | None:
    """Spread over seeds of the task average and of perplexities; none where nothing was run with several."""
    quality, rows = material.quality, []
    if not quality.summary_tasks:
        return None
    for group in _grouped(quality, quality.summary_of(quality.every), "seed"):
        tasks = _common(group)
        if tasks:
            values = [quality.average(one, tasks) or 0.0 for one in group]
            rows.append(_spread(group, f"average of {len(tasks)} tasks, %", [100 * value for value in values], 1))
    for group in _grouped(quality, _texts(quality), "seed"):
        for column in _common(group):
            values = [cell_value(one.cells[column]) or 0.0 for one in group]
            rows.append(_spread(group, column, values, 2 if max(values) < 1000 else 0))
    return Content([Block(_SEED_COLUMNS, rows)]) if rows else None


_SEED_COLUMNS = ["method", "model", "scope", "mode", "sparsity", "of", "seeds", "mean", "standard deviation", "least"]
_SEED_COLUMNS += ["most"]


def _spread(group: Group, what: str, values: Sequence[float], digits: int) -> list[str]:
    one = group[0].setting
    where = [str(one[c]) for c in ("method", "model", "scope", "mode")] + [f"{one['sparsity_target']:g}"]
    found = [float(np.mean(values)), float(np.std(values, ddof=1)), min(values), max(values)]
    return [*where, what, str(len(values)), *(fixed(value, digits) for value in found)]


def text_name(source: str, in_domain: bool) -> str:
    """Short name of a calibration text for tables."""
    if in_domain:
        return "train splits"
    return PurePosixPath(source.partition(":")[2] or source).name.partition(".")[0]


def calibrations(material: Material) -> Content | None:
    """Fits on the tasks' train splits against fits on other text, none where no setting has both."""
    quality, in_domain = material.quality, material.in_domain
    if not quality.summary_tasks:
        return None
    blocks = [
        *_blocks(quality, quality.summary_of(quality.every), in_domain, average=True),
        *_blocks(quality, _texts(quality), in_domain, average=False),
    ]
    return Content(blocks) if blocks else None


def _blocks(quality: Quality, rows: pd.DataFrame, in_domain: Mapping[str, bool], *, average: bool) -> Iterator[Block]:
    found: dict[tuple[str, str], list[tuple[Average, Average]]] = {}
    for group in _grouped(quality, rows, "calibration"):
        inside = [one for one in group if in_domain.get(str(one.setting["calibration"]))]
        outside = [one for one in group if one not in inside]
        for pair in ((one, other) for one in inside for other in outside):
            place = (str(pair[0].setting["model"]), str(pair[0].setting["scope"]))
            found.setdefault(place, []).append(pair)
    for (model, scope), pairs in found.items():
        columns = list(dict.fromkeys(column for pair in pairs for column in _common(pair)))
        header = ["method", "sparsity", "fitted on", "realised", *(c.replace(" ", ", ") for c in columns)]
        lines = [line for one, other in pairs for line in _lines(quality, one, other, columns, in_domain, average)]
        yield Block([*header, *(["average"] if average else [])], lines, f"{model}, scope `{scope}`")


def _lines(
    quality: Quality, one: Average, other: Average, columns: list[str], in_domain: Mapping[str, bool], average: bool
) -> Iterator[list[str]]:
    name = [one.method, f"{one.setting['sparsity_target']:g}"]
    for each in (other, one):
        values = [cell_value(each.cells.get(column)) for column in columns]
        shown = [percent(v) if average else MISSING if v is None else fixed(v, 1) for v in values]
        last = [percent(quality.average(each, columns))] if average else []
        source = str(each.setting["calibration"])
        yield [*name, text_name(source, bool(in_domain.get(source))), fixed(each.realised, 3), *shown, *last]
    found: list[Interval | None] = [
        quality.difference(one.cells[c], other.cells[c]) if c in one.cells and c in other.cells else None
        for c in columns
    ]
    shown = [signed(f) if average else signed(f, 1, 1) for f in found]
    last = [signed(quality.average_difference(one, other, columns))] if average else []
    yield [*name, "difference", "", *shown, *last]


TABLES = (
    ReportTable(
        "seeds",
        "Spread over seeds",
        "Settings that were run with several seeds (of the noise of random; of a fit: its split of the text and its "
        "training), each on the same documents.",
        seeds,
        is_open=False,
    ),
    ReportTable(
        "calibration",
        "Fitted in domain and out of domain",
        "The same method at the same sparsity, its thresholds or predictors fitted on the train splits of evaluated tasks "
        "and on other text; percent, perplexities as they are. Difference: train splits minus the other text on the same "
        "documents, points (perplexities as they are), with its 95 % interval, not corrected for the number of comparisons.",
        calibrations,
        is_open=False,
    ),
)
