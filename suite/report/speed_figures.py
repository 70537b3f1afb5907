"""Figures of speed rows: speed-up with its bound, efficiency as a heat map, time split per phase."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from suite.report.frames import method_order
from suite.report.speed import PROBES, SHAPE
from suite.report.style import WIDTH, label_ends, look, new_figure

FEWEST = 4  # sparsities of a panel of speed-ups; shorter lines stand in the tables
_HEAT = "viridis"
# light to dark in the order of the phases; "wait" in grey: nothing is read
_PHASES = {"first packet": "#a2d4ec", "z = V x": "#73bfe2", "choose": "#46abdb", "logits": "#46abdb"}
_PHASES |= {"dense and active rows": "#2a8ebd", "active rows": "#12719e", "wait": "#9d9d9d", "sum of y": "#fdbf11"}


def lines_of(data: pd.DataFrame, by: str = "label") -> list[tuple[str, str, pd.DataFrame]]:
    """(label, method, rows) of every sparse line in print order."""
    groups = [(str(k), str(g["method"].iloc[0]), g) for k, g in data.groupby(by, sort=False)]
    groups = [group for group in groups if group[1] != "dense"]
    return sorted(groups, key=lambda group: (method_order(group[1]), group[0]))


def draw_speedup_vs_sparsity(data: pd.DataFrame) -> Figure | None:
    """Speed-up over the fastest dense against sparsity, the byte bound dashed; a panel per shape."""
    sparse = data[(data["method"] != "dense") & ~data["variant"].isin(PROBES)]
    if sparse.empty:
        return None
    columns = [*SHAPE, "clock"]
    groups = [(key, g) for key, g in sparse.groupby(columns, sort=False, dropna=False)]
    long = [(key, g) for key, g in groups if g["sparsity_target"].nunique() >= FEWEST]
    groups = sorted(long or groups, key=lambda group: (group[0][0], int(group[1]["batch_size"].iloc[0])))
    n_columns = min(2, len(groups))
    n_rows = math.ceil(len(groups) / n_columns)
    figure = new_figure(WIDTH if n_columns > 1 else 0.62 * WIDTH, 3.0 * n_rows)
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for (_, group), axes in zip(groups, grid.flat, strict=False):
        _speed_panel(axes, group)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    return figure


def _speed_panel(axes: Axes, group: pd.DataFrame) -> None:
    keyed = group.assign(line=group["label"] + " " + group["backend"] + " " + group["variant"])
    several = keyed.groupby("label")["line"].nunique().gt(1).any()
    ends = []
    for name, method, rows in lines_of(keyed, "line"):
        rows = rows.sort_values("sparsity_realized")
        style, x = look(method), rows["sparsity_realized"].to_numpy(dtype=float)
        axes.plot(x, rows["bound"], color=style.color, linestyle=(0, (4, 2)), linewidth=0.9, alpha=0.8, zorder=2)
        axes.fill_between(x, rows["speed_up_low"], rows["speed_up_high"], color=style.color, alpha=0.18, linewidth=0)
        axes.plot(x, rows["speed_up"], color=style.color, marker=style.marker, zorder=3)
        label = name if several else str(rows["label"].iloc[0])
        ends.append((float(x[-1]), float(rows["speed_up"].iloc[-1]), label, style.color))
    axes.axhline(1, color="black", linewidth=1.0, zorder=1)
    low, high = axes.get_ylim()
    if low > 0 and high / low > 4:  # powers of two leave too few ticks on a shorter axis
        axes.set_yscale("log", base=2)
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    axes.margins(x=0.04)
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    label_ends(axes, [*ends, (axes.get_xlim()[1], 1.0, "dense", "black")], 2.4)
    first = group.iloc[0]
    axes.set_title(
        f"{first['model_shape'] or first['model']}, {first['level']}, {first['dtype']}, batch {first['batch_size']}"
    )
    axes.set_xlabel("realised sparsity (dashed: byte bound)")
    axes.set_ylabel("speed-up over fastest dense")


def draw_efficiency(data: pd.DataFrame) -> Figure | None:
    """Efficiency by shape (rows) and sparsity (columns): a row of panels per setting, a panel per method."""
    settings = [g for _, g in data.groupby(["level", "dtype", "batch_size", "clock", "backend"], sort=False)]
    settings = [g for g in settings if g["model_shape"].nunique() > 1]
    if not settings:
        return None
    n_columns = max(g["label"].nunique() for g in settings)
    heights = [0.85 + 0.17 * g["model_shape"].nunique() for g in settings]
    figure = new_figure(WIDTH, sum(heights))
    grid = figure.subplots(len(settings), n_columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for group, line in zip(settings, grid, strict=True):
        methods = lines_of(group)
        for (label, _, rows), axes in zip(methods, line, strict=False):
            _heat_panel(axes, rows, label)
        for axes in line[len(methods) :]:
            axes.set_visible(False)
        first = group.iloc[0]
        line[0].set_title(f"{first['level']}, {first['dtype']}, {first['clock']}\n{methods[0][0]}")
        for axes in line[1:]:
            axes.set_yticklabels([])
    return figure


def _heat_panel(axes: Axes, rows: pd.DataFrame, label: str) -> None:
    shapes = sorted(set(rows["model_shape"]))
    sparsities = sorted(set(rows["sparsity_target"]))
    values = np.full((len(shapes), len(sparsities)), np.nan)
    for _, row in rows.iterrows():
        values[shapes.index(row["model_shape"]), sparsities.index(row["sparsity_target"])] = row["efficiency"]
    axes.imshow(values, cmap=_HEAT, vmin=0.2, vmax=1.0, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if math.isfinite(value):
            text = f"{value:.2f}".removeprefix("0")
            axes.text(j, i, text, ha="center", va="center", fontsize=5, color="white" if value < 0.7 else "black")
    axes.grid(visible=False)
    axes.set_xticks(range(len(sparsities)), [f"{s:g}".removeprefix("0") or "0" for s in sparsities], fontsize=6)
    axes.set_yticks(range(len(shapes)), shapes, fontsize=6)
    axes.tick_params(length=0)
    axes.set_title(label)


def draw_phases(data: pd.DataFrame) -> Figure:
    """Microseconds in each phase, stacked, a bar per method and sparsity; a panel per shape.

    Without the first: dependent launches wait in it until the layer in front has ended.
    """
    data = data[data["phase"] != "fill"]
    shapes = list(dict.fromkeys(data["model_shape"]))
    bars = max(data[data["model_shape"] == shape]["bar"].nunique() for shape in shapes)
    figure = new_figure(WIDTH, (0.7 + 0.24 * bars) * len(shapes) + 0.4)
    grid = figure.subplots(len(shapes), 1, squeeze=False)
    drawn: dict[str, Artist] = {}
    for shape, axes in zip(shapes, grid.flat, strict=True):
        rows = data[data["model_shape"] == shape]
        names = list(dict.fromkeys(rows["bar"]))
        for place, name in enumerate(names):
            at = 0.0
            for _, row in rows[rows["bar"] == name].iterrows():
                color = _PHASES.get(str(row["phase"]), "#000000")
                (patch,) = axes.barh(place, row["us_median"], left=at, color=color, height=0.7)
                drawn.setdefault(str(row["phase"]), patch)
                if row["us_median"] >= 1.5:
                    middle = at + row["us_median"] / 2
                    axes.text(middle, place, f"{row['us_median']:.1f}", ha="center", va="center", fontsize=5.5)
                at += row["us_median"]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_title(f"{shape}, {rows['dtype'].iloc[0]}, batch {rows['batch_size'].iloc[0]}")
        axes.set_xlabel("microseconds from the end of the layer in front, median over blocks")
    order = [name for name in _PHASES if name in drawn]
    figure.legend([drawn[name] for name in order], order, loc="outside lower center", ncols=len(order))
    return figure
