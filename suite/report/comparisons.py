"""Paired differences between methods on the same documents, with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from suite.report.quality import Average, Interval, Quality, are_unequal, cell_value
from suite.report.results import SETTING
from suite.statistics import CONFIDENCE

AVERAGE = "average"
LEVEL = 1 - CONFIDENCE


@dataclass(frozen=True)
class Comparison:
    """One setting against another on one column (a task, ``task metric`` of a perplexity, or the average).

    ``found`` is the paired difference with its interval, of perplexities the log-ratio; ``p_value`` is two-sided.
    """

    column: str
    found: Interval
    p_value: float | None

    @property
    def is_ratio(self) -> bool:
        """Whether ``found`` is a log-ratio."""
        return self.column.endswith("perplexity")


@dataclass(frozen=True)
class Row:
    """One setting of the first method against one of the second in the same block."""

    one: Average
    other: Average
    comparisons: dict[str, Comparison]

    @property
    def is_unequal(self) -> bool:
        """Whether one of them is practical and they realise sparsities more than .01 apart: no fair comparison."""
        return are_unequal(self.one, self.other)


def p_value(found: Interval) -> float | None:
    """Two-sided p-value of no difference: normal, with the standard error that the width of the interval gives.

    The bootstrap's own tail ends at 1 / 2000, which Holm's correction of a hundred comparisons could never pass.
    """
    value, low, high = found
    if low is None or high is None:
        return None
    error = (high - low) / (2 * float(norm.ppf(1 - LEVEL / 2)))
    if error == 0:
        return 1.0 if value == 0 else None  # every document alike: nothing to estimate an error from
    return float(2 * norm.sf(abs(value) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down rule, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def pair_rows(quality: Quality, first: str, second: str) -> dict[tuple[str, str, str], list[Row]]:
    """Comparisons of two methods by (model, dtype, scope): a family, which Holm's rule corrects together."""
    pairs: dict[tuple[Any, ...], Row] = {}
    for blocks, compare in ((quality.summary_blocks, _compared), (quality.perplexity_blocks, compared_texts)):
        for block, settings in blocks:
            tasks = quality.tasks_of(block)
            for one in (s for s in settings if s.method == first):
                for other in (s for s in settings if s.method == second):
                    row = pairs.setdefault((place(one.setting), place(other.setting)), Row(one, other, {}))
                    row.comparisons.update({c.column: c for c in compare(quality, one, other, tasks)})
    families: dict[tuple[str, str, str], list[Row]] = {}
    for row in pairs.values():
        model, dtype, scope = (str(row.one.setting[c]) for c in ("model", "dtype", "scope"))
        families.setdefault((model, dtype, scope), []).append(row)
    return families


def place(setting: dict[str, Any]) -> tuple[Any, ...]:
    """Values of a setting: what tells it from all others."""
    return tuple(setting[column] for column in SETTING)


def _compared(quality: Quality, one: Average, other: Average, tasks: Sequence[str]) -> Iterator[Comparison]:
    for task in tasks:
        cells = one.cells.get(task), other.cells.get(task)
        if cells[0] is None or cells[1] is None or cell_value(cells[0]) is None or cell_value(cells[1]) is None:
            continue
        found = quality.difference(cells[0], cells[1])
        if found is not None:
            yield Comparison(task, found, p_value(found))
    average = quality.average_difference(one, other, tasks)
    if average is not None:
        yield Comparison(AVERAGE, average, p_value(average))


def compared_texts(quality: Quality, one: Average, other: Average, _tasks: Sequence[str] = ()) -> Iterator[Comparison]:
    """Log-ratio of every perplexity that both settings have."""
    for column in sorted(one.cells.keys() & other.cells.keys()):
        base = cell_value(other.cells[column])
        if cell_value(one.cells[column]) is None or not base:
            continue
        found = quality.difference(one.cells[column], other.cells[column])
        if found is not None:
            value, low, high = (None if end is None else math.log1p(end / base) for end in found)
            ratio: Interval = (float(value or 0.0), low, high)
            yield Comparison(column, ratio, p_value(ratio))


def corrected(rows: Sequence[Row]) -> dict[tuple[int, str], float]:
    """Holm-adjusted p-values of a family by (row, column); rows of unequal realised sparsity are not comparisons."""
    tests = [
        ((number, column), comparison.p_value)
        for number, row in enumerate(rows)
        if not row.is_unequal
        for column, comparison in row.comparisons.items()
        if comparison.p_value is not None
    ]
    known = [(key, p) for key, p in tests if p is not None]
    return dict(zip((key for key, _ in known), holm([p for _, p in known]), strict=True))


def settled(rows: Sequence[Row], adjusted: dict[tuple[int, str], float]) -> tuple[int, int]:
    """How often the first method is better and worse after correction."""
    gains = [
        (-1 if rows[row].comparisons[column].is_ratio else 1) * rows[row].comparisons[column].found[0]
        for (row, column), p in adjusted.items()
        if p < LEVEL
    ]
    return sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
