"""Figures of quality against realised sparsity: averages, every task, perplexities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.report.figures.panels import CHANCE, draw_line, groups, legend, lines_of, modes_of, of_mode
from suite.report.material import Material
from suite.report.methods import dense_rows, floor_rows, is_floor
from suite.report.objects import ReportFigure
from suite.report.quality import Average, Blocks, cell_value
from suite.report.results import number
from suite.report.style import DENSE, WIDTH, label_ends, look, new_figure, plain_log
from suite.report.task_names import task_order, text_order

POINT = ["model", "dtype", "scope", "mode", "method", "label", "sparsity_target", "sparsity_realized", "bytes_share"]
AVERAGE_COLUMNS = [*POINT, "n_tasks", "value", "ci_low", "ci_high", "chance"]
CELL_COLUMNS = [*POINT, "task", "metric", "value", "ci_low", "ci_high", "chance"]
_DODGE = 0.0035  # sideways distance between methods of equal sparsity, so that their intervals can be told apart


def _point(one: Average) -> dict[str, Any]:
    point = {c: one.setting[c] for c in ("model", "dtype", "scope", "mode", "method", "sparsity_target")}
    return point | {"label": one.label, "sparsity_realized": one.realised, "bytes_share": one.bytes_share}


def quality_averages(material: Material) -> pd.DataFrame:
    """Task average of every setting; its interval is that of the paired difference to dense, set upon dense's value."""
    quality, rows = material.quality, []
    for block, settings in quality.summary_blocks:
        tasks, dense = quality.tasks_of(block), quality.dense_of(block, settings)
        for one in settings:
            value = quality.average(one, tasks)
            if value is None:
                continue
            top = None if dense is None else quality.average(dense, tasks)
            found = None if dense is None or one is dense else quality.average_difference(one, dense, tasks)
            low, high = (None, None) if found is None or top is None else (_plus(top, found[1]), _plus(top, found[2]))
            chances = [number(one.cells[task]["chance"]) for task in tasks]
            known = [chance for chance in chances if chance is not None]
            chance = sum(known) / len(known) if known and len(known) == len(tasks) else None
            rows.append(
                _point(one)
                | {"scope": block["scope"], "n_tasks": len(tasks), "value": value, "ci_low": low, "ci_high": high}
                | {"chance": chance}
            )
    return _frame(rows, AVERAGE_COLUMNS)


def _plus(base: float, end: float | None) -> float | None:
    return None if end is None else base + end


def _frame(rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Rows once each (dense and the floor stand in several blocks) in the order of the tables."""
    return pd.DataFrame(rows, columns=columns).drop_duplicates().reset_index(drop=True)


def _cells(material: Material, blocks: Blocks, order: Callable[[str], Any]) -> pd.DataFrame:
    """Value of every cell with the interval of its paired difference to dense set upon dense's value."""
    quality = material.quality
    found: list[dict[str, Any]] = []
    for block, settings in blocks:
        dense = quality.dense_of(block, settings)
        for one in settings:
            for task in sorted(one.cells, key=order):
                cell = one.cells[task]
                value = cell_value(cell)
                if value is None:
                    continue
                delta, low, high = (number(cell[c]) for c in ("delta_dense", "delta_ci_low", "delta_ci_high"))
                top = None if dense is None else cell_value(dense.cells.get(task))
                base = value - delta if delta is not None else top
                known = not one.is_dense and base is not None
                found.append(
                    _point(one)
                    | {"scope": block["scope"], "task": task, "metric": cell["metric"], "value": value}
                    | {"ci_low": _plus(base, low) if known and base is not None else None}
                    | {"ci_high": _plus(base, high) if known and base is not None else None}
                    | {"chance": number(cell["chance"])}
                )
    return _frame(found, CELL_COLUMNS)


def quality_per_task(material: Material) -> pd.DataFrame:
    """Summary metric of every setting on every task."""
    quality = material.quality
    frame = _cells(material, quality.summary_blocks, task_order)
    tasks = {(str(b["model"]), str(b["scope"])): quality.tasks_of(b) for b, _ in quality.summary_blocks}
    keep = [
        task in tasks.get((model, scope), [])
        for model, scope, task in zip(frame["model"], frame["scope"], frame["task"], strict=True)
    ]
    return main_scope(frame[np.array(keep, dtype=bool)])


def main_scope(frame: pd.DataFrame) -> pd.DataFrame:
    """Without scope ``paper`` where the model has ``scored``: `quality_averages` and the tables have both."""
    main = frame.loc[frame["scope"] == "scored", "model"]
    return frame[(frame["scope"] != "paper") | ~frame["model"].isin(main)].reset_index(drop=True)


def perplexities(material: Material) -> pd.DataFrame:
    """Perplexity of every setting on every text that any sparse setting of its model and scope ran, in the main scope.

    Without the floor, whose thousands to billions would leave the others no room.
    """
    frame = _cells(material, material.quality.perplexity_blocks, text_order)
    sparse = frame[~dense_rows(frame)]
    pairs = set(zip(sparse["model"], sparse["scope"], sparse["task"], strict=True))
    keep = [key in pairs for key in zip(frame["model"], frame["scope"], frame["task"], strict=True)]
    return main_scope(frame[np.array(keep, dtype=bool) & ~floor_rows(frame)])


End = tuple[float | None, float, str, str]  # of a line, to be named: x (None: the axes' end), y, text, color


def _panel(axes: Axes, panel: pd.DataFrame, dense: pd.DataFrame, scale: float) -> list[End]:
    """Lines of one panel against realised sparsity with dense as a horizontal line; returns their ends."""
    lines = lines_of(panel)
    ends: list[End] = []
    dodged = [label for label, method, _ in lines if not is_floor(method)]
    for label, method, rows in lines:
        rows = rows.sort_values("sparsity_target")
        shift = (dodged.index(label) - (len(dodged) - 1) / 2) * _DODGE if label in dodged else 0.0
        x = rows["sparsity_realized"].to_numpy(dtype=float) + shift
        draw_line(axes, method, x, rows, scale)
        ends.append((float(x[-1]), scale * float(rows["value"].iloc[-1]), label, look(method).color))
    if not dense.empty:
        top = scale * float(dense["value"].iloc[0])
        axes.axhline(top, color="black", linewidth=1.0, zorder=1)
        ends.append((None, top, DENSE, "black"))
    if not lines:  # its x axis is shared: a name at its own end would lie far outside of the others' limits
        axes.text(0.5, 0.5, "no average yet", transform=axes.transAxes, ha="center", fontsize=7)
        return []
    axes.margins(x=0.04)
    return ends


def _name_ends(row: Sequence[Axes], ends: Sequence[list[End]], height: float) -> None:
    """Names at the right of every panel of a row, once all of it is drawn: its panels share the y axis."""
    for axes in row:
        axes.set_xlim(axes.get_xlim())
        low, high = axes.get_ylim()
        alone = high - low <= 1e-9 * abs(high)  # one point on a log axis gives no height that could be drawn
        axes.set_ylim(*((0.9 * low, 1.1 * high) if alone else (low, high)))
    for axes, own in zip(row, ends, strict=True):
        last = axes.get_xlim()[1]
        label_ends(axes, [(last if x is None else x, y, text, color) for x, y, text, color in own], height)


def _title(model: str, scope: str, more: str) -> str:
    return f"{model}, {more}" + (f" (scope {scope})" if scope else "")


def _grid(n_rows: int, n_columns: int, height: float) -> tuple[Figure, np.ndarray]:
    figure = new_figure(WIDTH if n_columns > 1 else 0.62 * WIDTH, n_rows * height)
    return figure, np.atleast_2d(figure.subplots(n_rows, n_columns, squeeze=False, sharey="row"))


def draw_quality_vs_sparsity(data: pd.DataFrame) -> Figure:
    """Task average against realised sparsity, ideal and practical side by side."""
    averages, modes = groups(data, "model", "dtype", "scope"), modes_of(data)
    figure, grid = _grid(len(averages), len(modes), 3.0)
    for ((model, _, scope), group), row in zip(averages, grid, strict=True):
        dense = group[dense_rows(group)]
        ends = [_panel(axes, of_mode(group, mode), dense, 100) for axes, mode in zip(row, modes, strict=True)]
        _name_ends(row, ends, 2.4)
        for axes, mode in zip(row, modes, strict=True):
            chance, (low, high) = group["chance"].dropna(), axes.get_ylim()
            if len(chance) and low <= 100 * chance.iloc[0] <= high:  # its name far outside would leave no room to draw
                axes.axhline(100 * chance.iloc[0], zorder=1, **CHANCE)
                axes.annotate(
                    "chance", (0.01, 100 * chance.iloc[0]), xycoords=("axes fraction", "data"), va="bottom", fontsize=7
                )
            axes.set_title(_title(model, scope, mode))
            axes.set_xlabel("realised sparsity")
            axes.label_outer()
        row[0].set_ylabel(f"average of {int(group['n_tasks'].max())} tasks, %")
    return figure


def draw_quality_per_task(data: pd.DataFrame) -> Figure:
    """Every task against realised sparsity; ideal above practical, up to four tasks side by side."""
    modes = modes_of(data)
    tasks = groups(data, "model", "dtype", "scope", "task")
    n_columns = min(4, len(tasks))
    n_bands = math.ceil(len(tasks) / n_columns)
    figure = new_figure(WIDTH, 0.6 + 1.75 * n_bands * len(modes))
    grid = figure.subplots(n_bands * len(modes), n_columns, squeeze=False, sharex=True)
    for axes in grid.flat:
        axes.set_visible(False)
    several = data.groupby(["model", "scope"]).ngroups > 1
    for index, ((model, _, scope, task), group) in enumerate(tasks):
        band, column = divmod(index, n_columns)
        for offset, mode in enumerate(modes):
            axes = grid[band * len(modes) + offset, column]
            axes.set_visible(True)
            _task_panel(axes, of_mode(group, mode), group)
            name = f"{task}\n{model}\n{scope}" if several else task
            axes.set_title(mode if offset else f"{name}: {mode}", fontsize=6.5 if several else 7.5)
            axes.set_ylabel(f"{group['metric'].iloc[0]}, %" if offset == 0 or column == 0 else "")
            if offset:
                axes.sharey(grid[band * len(modes), column])
            axes.tick_params(labelbottom=offset == len(modes) - 1)
    figure.supxlabel("realised sparsity", fontsize=8)
    legend(figure, data, chance=True)
    return figure


def _task_panel(axes: Axes, panel: pd.DataFrame, group: pd.DataFrame) -> None:
    lines = lines_of(panel)
    for index, (_, method, rows) in enumerate(lines):
        rows = rows.sort_values("sparsity_target")
        shift = 0 if is_floor(method) else (index - len(lines) / 2) * _DODGE
        draw_line(axes, method, rows["sparsity_realized"].to_numpy(dtype=float) + shift, rows, 100, markersize=3.5)
    _dense_and_chance(axes, group)


def _dense_and_chance(axes: Axes, group: pd.DataFrame) -> None:
    dense, chance = group[dense_rows(group)], group["chance"].dropna()
    if not dense.empty:
        axes.axhline(100 * float(dense["value"].iloc[0]), color="black", linewidth=1.0, zorder=1)
    if len(chance) and chance.iloc[0] > 0:
        axes.axhline(100 * chance.iloc[0], zorder=1, **CHANCE)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -4), top=min(axes.get_ylim()[1], 104))


def draw_perplexity_vs_sparsity(data: pd.DataFrame) -> Figure:
    """Perplexity on a log axis against realised sparsity."""
    texts, modes = groups(data, "model", "dtype", "scope", "task"), modes_of(data)
    figure, grid = _grid(len(texts), len(modes), 3.0)
    for ((model, _, scope, task), group), row in zip(texts, grid, strict=True):
        row[0].set_yscale("log")
        dense = group[dense_rows(group)]
        ends = [_panel(axes, of_mode(group, mode), dense, 1) for axes, mode in zip(row, modes, strict=True)]
        _name_ends(row, ends, 2.4)
        for axes, mode in zip(row, modes, strict=True):
            plain_log(axes)
            axes.set_title(_title(model, scope, mode))
            axes.set_xlabel("realised sparsity")
            axes.label_outer()
        row[0].set_ylabel(f"{task.partition(' ')[0]}: {task.partition(' ')[2].replace('_', ' ')}")
    return figure


FIGURES = (
    ReportFigure(
        "quality_vs_sparsity",
        "Task average against realised sparsity. Bars: 95 % interval of the paired difference to dense, set upon dense's "
        "value. Methods of equal sparsity are set apart sideways so that bars can be read.",
        AVERAGE_COLUMNS,
        quality_averages,
        draw_quality_vs_sparsity,
    ),
    ReportFigure(
        "quality_per_task",
        "The same, task by task; scope `scored` where the run has several.",
        CELL_COLUMNS,
        quality_per_task,
        draw_quality_per_task,
    ),
    ReportFigure(
        "perplexity_vs_sparsity",
        "Perplexity against realised sparsity, log axis; bars as above, from log-ratios. Without random, which is in the "
        "table, and scope `paper` where the run has `scored`.",
        CELL_COLUMNS,
        perplexities,
        draw_perplexity_vs_sparsity,
    ),
)
