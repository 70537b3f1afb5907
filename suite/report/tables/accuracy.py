"""Tables of accuracy as a paper prints them: rows methods, columns tasks and average, blocks per model and sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.quality import Average, Cell, Interval, Quality, unequal
from suite.report.results import number
from suite.report.tables import cells
from suite.report.text import MISSING, percent, signed

_BESIDE = (
    "Columns right of the average are not in it: the matrix has those tasks in some modes and sparsities alone.\n\n"
)


def accuracies(material: Material) -> Content | None:
    """Summary metric of every task and the average over tasks, in percent, best in bold."""
    quality = material.quality
    if not quality.summary_tasks:
        return None
    blocks = [_accuracies(quality, block, settings) for block, settings in quality.summary_blocks]
    beside = any(quality.tasks_beside(block, settings) for block, settings in quality.summary_blocks)
    return Content(blocks, _BESIDE if beside else "", cells.shots_note(quality.ok))


def _accuracies(quality: Quality, block: dict[str, Any], settings: Sequence[Average]) -> Block:
    marked, tasks, beside = unequal(settings), quality.tasks_of(block), quality.tasks_beside(block, settings)
    best = {task: cells.best_of(settings, *cells.on_task(quality, task)) for task in (*tasks, *beside)}
    best_average = cells.best_of(settings, *cells.on_average(quality, tasks))
    rows = []
    for one in settings:
        value = {
            task: cells.bold(cells.shown(one.cells.get(task), percent), one.label == found)
            for task, found in best.items()
        }
        average = cells.bold(percent(quality.average(one, tasks)), one.label == best_average)
        columns = _columns(tasks, average, beside, value)
        rows.append([cells.name(one, block), cells.realised(one, marked), *columns])
    metrics = {task: f"{task} ({(quality.metric_of(task) or ('', ''))[0]})" for task in best}
    header = ["method", "realised", *_columns(tasks, "average", beside, metrics)]
    return Block(header, rows, cells.block_title(block), cells.block_notes(settings, marked))


def _columns(tasks: Sequence[str], average: str, beside: Sequence[str], of: Mapping[str, str]) -> list[str]:
    """Tasks of the average, the average, and the tasks beside it."""
    return [*(of[task] for task in tasks), average, *(of[task] for task in beside)]


def differences(material: Material) -> Content | None:
    """Paired differences to dense with intervals, in points."""
    quality = material.quality
    if not quality.summary_tasks:
        return None
    blocks = [_differences(quality, block, settings) for block, settings in quality.summary_blocks]
    return Content(blocks, after=cells.shots_note(quality.ok))


def _differences(quality: Quality, block: dict[str, Any], settings: Sequence[Average]) -> Block:
    dense, tasks = quality.dense_of(block, settings), quality.tasks_of(block)
    beside = quality.tasks_beside(block, settings)
    rows = []
    for one in settings:
        if one.is_dense:
            continue
        value = {}
        for task in (*tasks, *beside):
            cell = one.cells.get(task)
            value[task] = MISSING if cell is None else cells.shown(cell, partial(_delta_text, cell))
        average = None if dense is None else quality.average_difference(one, dense, tasks)
        rows.append([cells.name(one, block), *_columns(tasks, signed(average), beside, value)])
    header = _columns(tasks, "average", beside, {task: task for task in (*tasks, *beside)})
    return Block(["method", *header], rows, cells.block_title(block))


def _delta_text(cell: Cell, _: float) -> str:
    return signed(_stored_delta(cell))


def _stored_delta(cell: Cell) -> Interval | None:
    if (value := number(cell["delta_dense"])) is None:
        return None
    return value, number(cell["delta_ci_low"]), number(cell["delta_ci_high"])


TABLES = (
    ReportTable("accuracy", "Accuracy", f"Percent. {cells.BOLD_RULE}", accuracies),
    ReportTable(
        "difference_to_dense",
        "Difference to dense",
        "Points of the summary metric, 95 % percentile bootstrap interval over the same documents (generated items: over "
        "templates); the average resamples documents within each task. Intervals are not corrected for the number of "
        "comparisons.",
        differences,
    ),
)
