"""What panels of several figures share: lines with intervals, groups, modes, the names at the ends of lines, the legend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from suite.report.methods import floor_rows, is_dense, is_floor, method_order
from suite.report.style import DENSE, WIDTH, label_ends, look, new_figure

MODES = ("ideal", "practical")
CHANCE: Any = {"color": "#777777", "linewidth": 0.9, "linestyle": (0, (1, 2))}
DASHED: Any = {"linestyle": (0, (3, 1.5)), "linewidth": 0.9}
IDEAL: Any = {"markerfacecolor": "white"} | DASHED


def lines_of(data: pd.DataFrame, by: str = "label") -> list[tuple[str, str, pd.DataFrame]]:
    """(label, method, rows) of every sparse line in print order."""
    lines = [(str(k), str(g["method"].iloc[0]), g) for k, g in data.groupby(by, sort=False)]
    lines = [line for line in lines if not is_dense(line[1])]
    return sorted(lines, key=lambda line: (method_order(line[1]), line[0]))


def groups(data: pd.DataFrame, *columns: str) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """Rows that agree in some columns, with their values as text, in the order of their first row."""
    return [(tuple(map(str, key)), group) for key, group in data.groupby(list(columns), sort=False)]


def modes_of(data: pd.DataFrame) -> list[str]:
    """Modes with a sparse row; one where every sparse cell has failed: its panel then says so."""
    found = [mode for mode in MODES if (data.loc[~floor_rows(data), "mode"] == mode).any()]
    return found or [MODES[0]]


def of_mode(data: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Rows of a mode, with the floor (which has only an ideal mode) in the practical panel too."""
    return data[(data["mode"] == mode) | (floor_rows(data) & (data["mode"] == MODES[0]))]


def draw_line(axes: Axes, method: str, x: Any, rows: pd.DataFrame, scale: float = 1.0, **more: Any) -> None:
    """Draw ``value`` x ``scale`` of some rows over ``x``, with bars from ``ci_low`` to ``ci_high``; the floor without."""
    style = look(method)
    y = scale * rows["value"].to_numpy(dtype=float)
    low, high = (scale * rows[c].to_numpy(dtype=float) for c in ("ci_low", "ci_high"))
    drawn: dict[str, Any] = {"color": style.color, "marker": style.marker, "linestyle": style.line, "zorder": 3}
    axes.plot(x, y, **(drawn | more))
    if not is_floor(method) and np.isfinite(low).any():
        # an end below 0 cannot be drawn on a log axis, an interval not around its value not as a bar
        bars = np.nan_to_num(np.clip(np.stack([y - low, high - y]), 0, None))
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=style.color, elinewidth=0.8, capsize=1.5, alpha=0.6, zorder=2)


def legend(figure: Figure, data: pd.DataFrame, *, chance: bool = False, modes: bool = False) -> None:
    """One legend above all panels: methods, dense, and what else is drawn."""
    handles = []
    for label, method, _ in lines_of(data):
        style = look(method)
        handles.append(Line2D([], [], color=style.color, marker=style.marker, label=label))
    handles.append(Line2D([], [], color="black", linewidth=1.0, marker="*" if modes else "", label=DENSE))
    if chance:
        handles.append(Line2D([], [], label="chance", **CHANCE))
    if modes:
        handles.append(Line2D([], [], color="#444444", marker="o", label="practical"))
        handles.append(Line2D([], [], color="#444444", marker="o", label="ideal", **IDEAL))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)))


def rows_of_two(n_rows: int) -> tuple[Figure, Any]:
    """A figure of two panels a row, and its axes."""
    figure = new_figure(WIDTH, 2.8 * n_rows)
    return figure, figure.subplots(n_rows, 2, squeeze=False)


def finish(
    axes: Axes, ends: list[tuple[float, float, str, str]], name: str, *, margin: float = 0.03, height: float = 2.2
) -> None:
    """Fix the limits of a panel that is drawn, name its x axis, and its lines at their ends."""
    axes.margins(x=margin)
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    axes.set_xlabel(name)
    label_ends(axes, ends, height)
