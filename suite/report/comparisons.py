"""Paired differences between methods on the same documents, with Holm's correction, and what the scope hides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import norm

from suite.report.frames import SETTING, Average, Interval, Quality, are_unequal, cell_value, number, task_order
from suite.report.text import MISSING, fixed, markdown_table, percent, signed
from suite.statistics import CONFIDENCE, FloatArray

PAIRS = (("m-countdown", "cats"), ("d-countdown", "dejavu"), ("d-countdown", "dejavu-abs"))
AVERAGE = "average"
LEVEL = 1 - CONFIDENCE
SCOPE, HIDING = "scored", "paper"  # the scope that makes every scored position sparse, and the one that does not


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
        practical = "practical" in (self.one.setting["mode"], self.other.setting["mode"])
        return practical and are_unequal(self.one, self.other)


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
    for blocks, compare in ((quality.summary_blocks, _compared), (quality.perplexity_blocks, _compared_texts)):
        for block, settings in blocks:
            tasks = quality.tasks_of(block)
            for one in (s for s in settings if s.method == first):
                for other in (s for s in settings if s.method == second):
                    row = pairs.setdefault((_place(one.setting), _place(other.setting)), Row(one, other, {}))
                    row.comparisons.update({c.column: c for c in compare(quality, one, other, tasks)})
    families: dict[tuple[str, str, str], list[Row]] = {}
    for row in pairs.values():
        model, dtype, scope = (str(row.one.setting[c]) for c in ("model", "dtype", "scope"))
        families.setdefault((model, dtype, scope), []).append(row)
    return families


def _place(setting: dict[str, Any]) -> tuple[Any, ...]:
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


def _compared_texts(quality: Quality, one: Average, other: Average, _tasks: Sequence[str]) -> Iterator[Comparison]:
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
    """Holm-adjusted p-values of a family by (row, column); rows of unequal realised sparsity are no comparisons."""
    tests = [
        ((number, column), comparison.p_value)
        for number, row in enumerate(rows)
        if not row.is_unequal
        for column, comparison in row.comparisons.items()
        if comparison.p_value is not None
    ]
    known = [(key, p) for key, p in tests if p is not None]
    return dict(zip((key for key, _ in known), holm([p for _, p in known]), strict=True))


def paired_table(quality: Quality) -> str:
    """Every pair of :data:`PAIRS`: difference per task, of the average and of perplexities, stars by Holm's rule."""
    text = (
        "# Methods against each other\n\nPoints of the summary metric, first method minus second, on the same documents "
        "with the 95 % interval (not corrected); perplexities: change of the first to the second in percent, lower is "
        "better. `*`: still different from 0 at the 5 % level after Holm's correction over all comparisons of the block, "
        "whose number stands below it (normal approximation with the interval's width; the tasks and sparsities of a "
        "block share documents, which makes the correction strict). ≠: realised sparsities more than .01 apart, shown "
        "but not compared.\n\n"
    )
    empty = True
    for first, second in PAIRS:
        for (model, dtype, scope), rows in pair_rows(quality, first, second).items():
            adjusted = corrected(rows)
            columns = _columns(rows)
            printed = [_printed(row, columns, partial(_star, adjusted, i)) for i, row in enumerate(rows)]
            text += f"### {first} against {second}: {model}, scope `{scope}`, {dtype}\n\n"
            header = ["setting", "realised", *(c.replace(" perplexity", ", perplexity %") for c in columns)]
            text += markdown_table(header, printed)
            won, lost = _settled(rows, adjusted)
            text += f"\n{len(adjusted)} comparisons, after correction {first} better in {won} and worse in {lost}.\n\n"
            empty = False
    return text if not empty else text + "None of these pairs has finished cells.\n"


def _columns(rows: Sequence[Row]) -> list[str]:
    found = {column for row in rows for column in row.comparisons}
    tasks = sorted((c for c in found if c != AVERAGE and not c.endswith("perplexity")), key=task_order)
    texts = sorted((c for c in found if c.endswith("perplexity")), key=lambda c: task_order(c.partition(" ")[0]))
    return [*tasks, *([AVERAGE] if AVERAGE in found else []), *texts]


def _printed(row: Row, columns: Sequence[str], star: Any) -> list[str]:
    one, other = row.one, row.other
    labels = "" if (one.label, other.label) == (one.method, other.method) else f" {one.label} / {other.label}"
    realized = f"{fixed(one.realized, 3)} / {fixed(other.realized, 3)}" + (" ≠" if row.is_unequal else "")
    cells = []
    for column in columns:
        found = row.comparisons.get(column)
        if found is None:
            cells.append(MISSING)
            continue
        ends = found.found
        if found.is_ratio:
            low, high = (None if end is None else math.expm1(end) for end in ends[1:])
            ends = (math.expm1(ends[0]), low, high)
        cells.append(signed(ends) + star(column))
    return [f"{one.setting['mode']} {one.setting['sparsity_target']:g}{labels}", realized, *cells]


def _star(adjusted: dict[tuple[int, str], float], row: int, column: str) -> str:
    return " *" if adjusted.get((row, column), 1.0) < LEVEL else ""


def _settled(rows: Sequence[Row], adjusted: dict[tuple[int, str], float]) -> tuple[int, int]:
    """How often the first method is better and worse after correction."""
    gains = [
        (-1 if rows[row].comparisons[column].is_ratio else 1) * rows[row].comparisons[column].found[0]
        for (row, column), p in adjusted.items()
        if p < LEVEL
    ]
    return sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)


def paired_lines(quality: Quality) -> list[str]:
    """One sentence per pair and family for the report's summary."""
    lines = []
    for first, second in PAIRS:
        for (model, _, scope), rows in pair_rows(quality, first, second).items():
            adjusted = corrected(rows)
            won, lost = _settled(rows, adjusted)
            if adjusted:
                lines.append(
                    f"  * {first} against {second}, {model}, scope {scope}: better in {won}, worse in {lost}, not settled "
                    f"in {len(adjusted) - won - lost} of {len(adjusted)}."
                )
    return lines


def scope_table(quality: Quality) -> str:
    """How much a method seems to keep in scope ``paper`` because positions stay dense there."""
    text = (
        "# Effect of the scope\n\nScope `paper` leaves the position that predicts the first answer token dense; scope "
        "`scored` makes every scored position sparse. Average over the tasks that were run in both, percent; difference "
        "paper - scored in points, paired, with its 95 % interval; hidden: the part of the loss to dense in scope "
        "`scored` that does not show in scope `paper`; sparse: share of the scored positions that scope `paper` really "
        "makes sparse.\n\n"
    )
    blocks = _scope_blocks(quality)
    if not blocks:
        return text + _why_no_scopes(quality)
    for (model, dtype), rows in blocks.items():
        header = ["method", "mode", "sparsity", "dense", "paper", "scored", "difference", "hidden", "sparse"]
        text += f"### {model}, {dtype}\n\n{markdown_table(header, rows)}\n"
    return text


def _why_no_scopes(quality: Quality) -> str:
    scopes = sorted(set(quality.summary["scope"]) - {""})
    only = f"this run has finished settings of scope {', '.join(scopes)} only" if scopes else "no setting is finished"
    return f"Empty: {only}, and the table needs the same setting in both scopes.\n"


def _scope_blocks(quality: Quality) -> dict[tuple[str, str], list[list[str]]]:
    settings = quality.settings(quality.summary)
    by_place = {_place(s.setting): s for s in settings}
    blocks: dict[tuple[str, str], list[list[str]]] = {}
    order = sorted(settings, key=lambda s: (s.setting["mode"], float(s.setting["sparsity_target"])))
    for one in (s for s in order if s.setting["scope"] == SCOPE):
        hiding = by_place.get(_place({**one.setting, "scope": HIDING}))
        dense = quality.dense_of(one.setting, settings)
        if hiding is None or dense is None:
            continue
        tasks = [t for t in one.cells if all(cell_value(s.cells.get(t)) is not None for s in (one, hiding, dense))]
        if tasks:
            key = (str(one.setting["model"]), str(one.setting["dtype"]))
            blocks.setdefault(key, []).append(_scope_row(quality, one, hiding, dense, sorted(tasks, key=task_order)))
    return blocks


def _scope_row(quality: Quality, one: Average, hiding: Average, dense: Average, tasks: list[str]) -> list[str]:
    values = [quality.average(s, tasks) for s in (dense, hiding, one)]
    difference = quality.average_difference(hiding, one, tasks)
    shares = [number(hiding.cells[task]["sparse_share"]) for task in tasks]
    known = [share for share in shares if share is not None]
    sparse = sum(known) / len(known) if known and len(known) == len(tasks) else None
    hidden = quality.quantity([dense, hiding, one], tasks, _hidden)
    lost = quality.average_difference(dense, one, tasks)
    settled = lost is not None and lost[1] is not None and lost[1] > 0  # no share of a loss that may be none
    return [
        one.label,
        str(one.setting["mode"]),
        f"{one.setting['sparsity_target']:g}",
        *map(percent, values),
        signed(difference),
        signed(hidden, digits=0) + " %" if hidden is not None and settled else f"{MISSING} (no loss settled)",
        percent(sparse, 0) + " %",
    ]


def _hidden(means: list[FloatArray]) -> Any:
    dense, hiding, one = (sum(m[i] for m in means) for i in range(3))
    return 1 - (dense - hiding) / (dense - one)
