"""Figures, each drawn from its data frame (suite.report.series) alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from suite.report import series
from suite.report.coefficients import draw_activations, draw_cif_caf
from suite.report.decode_figures import (
    break_even,
    decode_phases,
    decode_tokens,
    draw_break_even,
    draw_decode_phases,
    draw_decode_tokens,
)
from suite.report.predictors import draw_predictor_layers, predictor_layers
from suite.report.speed_figures import draw_efficiency, draw_phases, draw_speedup_vs_sparsity, lines_of
from suite.report.style import WIDTH, label_ends, look, new_figure, plain_log, styled

MODES = ("ideal", "practical")
_CHANCE: Any = {"color": "#777777", "linewidth": 0.9, "linestyle": (0, (1, 2))}
_IDEAL: Any = {"markerfacecolor": "white", "linestyle": (0, (3, 1.5)), "linewidth": 0.9}
_DODGE = 0.0035  # sideways distance between methods of equal sparsity, so that their intervals can be told apart


def draw(name: str, data: pd.DataFrame) -> Figure | None:
    """Draw one figure of :data:`FIGURES` from its data; None where the data hold nothing to draw."""
    if data.empty:
        return None
    with styled():
        return FIGURES[name][1](data)


def _draw_line(axes: Axes, method: str, x: Any, rows: pd.DataFrame, scale: float = 1.0, **more: Any) -> None:
    style = look(method)
    y = scale * rows["value"].to_numpy(dtype=float)
    low, high = (scale * rows[c].to_numpy(dtype=float) for c in ("ci_low", "ci_high"))
    drawn: dict[str, Any] = {"color": style.color, "marker": style.marker, "linestyle": style.line, "zorder": 3}
    axes.plot(x, y, **(drawn | more))
    if method != "random" and np.isfinite(low).any():
        # an end below 0 cannot be drawn on a log axis, an interval not around its value not as a bar
        bars = np.nan_to_num(np.clip(np.stack([y - low, high - y]), 0, None))
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=style.color, elinewidth=0.8, capsize=1.5, alpha=0.6, zorder=2)


End = tuple[float | None, float, str, str]  # of a line, to be named: x (None: the axes' end), y, text, color


def _panel(axes: Axes, panel: pd.DataFrame, dense: pd.DataFrame, scale: float) -> list[End]:
    """Lines of one panel against realised sparsity with dense as a horizontal line; returns their ends."""
    lines = lines_of(panel)
    ends: list[End] = []
    dodged = [label for label, method, _ in lines if method != "random"]
    for label, method, rows in lines:
        rows = rows.sort_values("sparsity_target")
        shift = (dodged.index(label) - (len(dodged) - 1) / 2) * _DODGE if label in dodged else 0.0
        x = rows["sparsity_realized"].to_numpy(dtype=float) + shift
        _draw_line(axes, method, x, rows, scale)
        ends.append((float(x[-1]), scale * float(rows["value"].iloc[-1]), label, look(method).color))
    if not dense.empty:
        top = scale * float(dense["value"].iloc[0])
        axes.axhline(top, color="black", linewidth=1.0, zorder=1)
        ends.append((None, top, "dense", "black"))
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


def _groups(data: pd.DataFrame, *columns: str) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    return [(tuple(map(str, key)), group) for key, group in data.groupby(list(columns), sort=False)]


def _modes(data: pd.DataFrame) -> list[str]:
    """Modes with a sparse row; one where every sparse cell has failed: its panel then says so."""
    found = [mode for mode in MODES if (data.loc[data["method"] != "random", "mode"] == mode).any()]
    return found or [MODES[0]]


def _of_mode(data: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Rows of a mode, with random (which has only an ideal mode) in the practical panel too."""
    return data[(data["mode"] == mode) | ((data["method"] == "random") & (data["mode"] == "ideal"))]


def _title(model: str, scope: str, more: str) -> str:
    return f"{model}, {more}" + (f" (scope {scope})" if scope else "")


def _grid(n_rows: int, n_columns: int, height: float) -> tuple[Figure, np.ndarray]:
    figure = new_figure(WIDTH if n_columns > 1 else 0.62 * WIDTH, n_rows * height)
    return figure, np.atleast_2d(figure.subplots(n_rows, n_columns, squeeze=False, sharey="row"))


def draw_quality_vs_sparsity(data: pd.DataFrame) -> Figure:
    """Task average against realised sparsity, ideal and practical side by side."""
    groups, modes = _groups(data, "model", "dtype", "scope"), _modes(data)
    figure, grid = _grid(len(groups), len(modes), 3.0)
    for ((model, _, scope), group), row in zip(groups, grid, strict=True):
        dense = group[group["method"] == "dense"]
        ends = [_panel(axes, _of_mode(group, mode), dense, 100) for axes, mode in zip(row, modes, strict=True)]
        _name_ends(row, ends, 2.4)
        for axes, mode in zip(row, modes, strict=True):
            chance, (low, high) = group["chance"].dropna(), axes.get_ylim()
            if len(chance) and low <= 100 * chance.iloc[0] <= high:  # its name far outside would leave no room to draw
                axes.axhline(100 * chance.iloc[0], zorder=1, **_CHANCE)
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
    modes = _modes(data)
    groups = _groups(data, "model", "dtype", "scope", "task")
    n_columns = min(4, len(groups))
    n_bands = math.ceil(len(groups) / n_columns)
    figure = new_figure(WIDTH, 0.6 + 1.75 * n_bands * len(modes))
    grid = figure.subplots(n_bands * len(modes), n_columns, squeeze=False, sharex=True)
    for axes in grid.flat:
        axes.set_visible(False)
    several = data.groupby(["model", "scope"]).ngroups > 1
    for index, ((model, _, scope, task), group) in enumerate(groups):
        band, column = divmod(index, n_columns)
        for offset, mode in enumerate(modes):
            axes = grid[band * len(modes) + offset, column]
            axes.set_visible(True)
            _task_panel(axes, _of_mode(group, mode), group)
            name = f"{task}\n{model}\n{scope}" if several else task
            axes.set_title(mode if offset else f"{name}: {mode}", fontsize=6.5 if several else 7.5)
            axes.set_ylabel(f"{group['metric'].iloc[0]}, %" if offset == 0 or column == 0 else "")
            if offset:
                axes.sharey(grid[band * len(modes), column])
            axes.tick_params(labelbottom=offset == len(modes) - 1)
    figure.supxlabel("realised sparsity", fontsize=8)
    _legend(figure, data, chance=True)
    return figure


def _task_panel(axes: Axes, panel: pd.DataFrame, group: pd.DataFrame) -> None:
    lines = lines_of(panel)
    for index, (_, method, rows) in enumerate(lines):
        rows = rows.sort_values("sparsity_target")
        shift = 0 if method == "random" else (index - len(lines) / 2) * _DODGE
        _draw_line(axes, method, rows["sparsity_realized"].to_numpy(dtype=float) + shift, rows, 100, markersize=3.5)
    _dense_and_chance(axes, group)


def _dense_and_chance(axes: Axes, group: pd.DataFrame) -> None:
    dense, chance = group[group["method"] == "dense"], group["chance"].dropna()
    if not dense.empty:
        axes.axhline(100 * float(dense["value"].iloc[0]), color="black", linewidth=1.0, zorder=1)
    if len(chance) and chance.iloc[0] > 0:
        axes.axhline(100 * chance.iloc[0], zorder=1, **_CHANCE)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -4), top=min(axes.get_ylim()[1], 104))


def _legend(figure: Figure, data: pd.DataFrame, chance: bool = False, modes: bool = False) -> None:
    """One legend above all panels: methods, dense, and what else is drawn."""
    handles = []
    for label, method, _ in lines_of(data):
        style = look(method)
        handles.append(Line2D([], [], color=style.color, marker=style.marker, label=label))
    handles.append(Line2D([], [], color="black", linewidth=1.0, marker="*" if modes else "", label="dense"))
    if chance:
        handles.append(Line2D([], [], label="chance", **_CHANCE))
    if modes:
        handles.append(Line2D([], [], color="#444444", marker="o", label="practical"))
        handles.append(Line2D([], [], color="#444444", marker="o", label="ideal", **_IDEAL))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)))


def draw_perplexity_vs_sparsity(data: pd.DataFrame) -> Figure:
    """Perplexity on a log axis against realised sparsity."""
    groups, modes = _groups(data, "model", "dtype", "scope", "task"), _modes(data)
    figure, grid = _grid(len(groups), len(modes), 3.0)
    for ((model, _, scope, task), group), row in zip(groups, grid, strict=True):
        row[0].set_yscale("log")
        dense = group[group["method"] == "dense"]
        ends = [_panel(axes, _of_mode(group, mode), dense, 1) for axes, mode in zip(row, modes, strict=True)]
        _name_ends(row, ends, 2.4)
        for axes, mode in zip(row, modes, strict=True):
            plain_log(axes)
            axes.set_title(_title(model, scope, mode))
            axes.set_xlabel("realised sparsity")
            axes.label_outer()
        row[0].set_ylabel(f"{task.partition(' ')[0]}: {task.partition(' ')[2].replace('_', ' ')}")
    return figure


def draw_quality_vs_bytes(data: pd.DataFrame) -> Figure | None:
    """What is kept against what is read: average, perplexity, and measured speed-up where it is of the same model."""
    quality = data[~data["quantity"].str.startswith("speed-up")]
    speed = data[data["quantity"].str.startswith("speed-up")]
    rows = _groups(quality, "model", "dtype", "scope")
    if not rows:
        return None
    lines: list[tuple[str, list[tuple[str, pd.DataFrame]]]] = []  # measured speed-ups stand in a row of their own
    for (model, _, scope), group in rows:
        title = f"{model} (scope {scope})" if scope else model
        lines.append((title, [(quantity, own) for (quantity,), own in _groups(group, "quantity")]))
        measured = speed[speed["model"] == model]
        if not measured.empty:
            title = f"{model}, measured"
            lines.append((title, [(quantity, own) for (quantity,), own in _groups(measured, "quantity")]))
    n_columns = max(len(panels) for _, panels in lines)
    figure = new_figure(WIDTH if n_columns > 1 else 0.62 * WIDTH, 0.5 + 2.4 * len(lines))
    grid = figure.subplots(len(lines), n_columns, squeeze=False)
    for (title, panels), row in zip(lines, grid, strict=True):
        for axes, (quantity, own) in zip(row, panels, strict=False):
            panel = _bytes_speed_panel if quantity.startswith("speed-up") else _bytes_panel
            panel(axes, own, quantity)
            axes.set_xlim(0, 105)
            whole = quantity.startswith("speed-up, decode")  # other weights of the model are read, too
            axes.set_xlabel(f"{'all' if whole else 'MLP'} bytes per token, % of dense")
        row[0].set_title(title)
        for axes in row[len(panels) :]:
            axes.set_visible(False)
    _legend(figure, data, modes=True)
    return figure


def _bytes_panel(axes: Axes, panel: pd.DataFrame, quantity: str) -> None:
    average = quantity == "average"
    scale = 100 if average else 1
    if not average:
        axes.set_yscale("log")
    for mode in MODES:
        for _, method, rows in lines_of(panel[panel["mode"] == mode]):
            rows = rows.sort_values("bytes_share")
            more = _IDEAL if mode == "ideal" and method != "random" else {}
            _draw_line(axes, method, 100 * rows["bytes_share"].to_numpy(dtype=float), rows, scale, **more)
    dense = panel[panel["method"] == "dense"]
    if not dense.empty:
        top = scale * float(dense["value"].iloc[0])
        axes.axhline(top, color="black", linewidth=0.8, zorder=1)
        axes.plot([100], [top], color="black", marker="*", markersize=8, zorder=4)
    if not average:
        plain_log(axes)
    axes.set_ylabel("task average, %" if average else quantity.replace(" perplexity", ""))


def _bytes_speed_panel(axes: Axes, panel: pd.DataFrame, quantity: str) -> None:
    for _, method, rows in lines_of(panel):
        rows = rows.sort_values("bytes_share")
        _draw_line(axes, method, 100 * rows["bytes_share"].to_numpy(dtype=float), rows)
    axes.axhline(1, color="black", linewidth=0.8, zorder=1)
    axes.plot([100], [1], color="black", marker="*", markersize=8, zorder=4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{quantity} over dense")


def draw_sparsity_per_layer(data: pd.DataFrame) -> Figure:
    """Realised sparsity of every layer, targets dotted; a panel per model."""
    groups = _groups(data, "model", "mode")
    figure = new_figure(WIDTH, 3.0 * len(groups))
    grid = figure.subplots(len(groups), 1, squeeze=False)
    for ((model, mode), group), axes in zip(groups, grid.flat, strict=True):
        ends = []
        for (label, target), rows in group.groupby(["label", "sparsity_target"], sort=False):
            method, rows = str(rows["method"].iloc[0]), rows.sort_values("layer")
            style = look(method)
            axes.plot(rows["layer"], rows["sparsity_realized"], color=style.color, marker=style.marker, markersize=3)
            last = rows.iloc[-1]
            ends.append((float(last["layer"]), float(last["sparsity_realized"]), f"{label}, {target:g}", style.color))
        for target in sorted(set(group["sparsity_target"])):
            axes.axhline(target, zorder=1, **_CHANCE)
        axes.margins(x=0.01)
        axes.set_xlim(axes.get_xlim())
        axes.set_ylim(axes.get_ylim())
        label_ends(axes, ends, 2.4)
        axes.set_title(f"{model}, {mode}")
        axes.set_xlabel("layer")
        axes.set_ylabel("realised sparsity (dotted: target)")
    return figure


FIGURES: dict[str, tuple[Callable[[series.Material], pd.DataFrame], Callable[[pd.DataFrame], Figure | None]]] = {
    "quality_vs_sparsity": (series.quality_averages, draw_quality_vs_sparsity),
    "quality_per_task": (series.quality_per_task, draw_quality_per_task),
    "perplexity_vs_sparsity": (series.perplexities, draw_perplexity_vs_sparsity),
    "quality_vs_bytes": (series.quality_against_bytes, draw_quality_vs_bytes),
    "speedup_vs_sparsity": (series.speed_ups, draw_speedup_vs_sparsity),
    "efficiency": (series.efficiencies, draw_efficiency),
    "phases": (series.phases, draw_phases),
    "decode_tokens": (lambda material: decode_tokens(material.speed), draw_decode_tokens),
    "decode_phases": (lambda material: decode_phases(material.speed, material.results.phases), draw_decode_phases),
    "break_even": (lambda material: break_even(material.speed), draw_break_even),
    "cif_caf": (lambda material: material.results.cif_caf, draw_cif_caf),
    "activations": (lambda material: material.results.activations, draw_activations),
    "predictors": (lambda material: predictor_layers(material.results), draw_predictor_layers),
    "sparsity_per_layer": (series.sparsity_per_layer, draw_sparsity_per_layer),
}
