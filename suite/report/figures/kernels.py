"""Figures of kernels: efficiency as a heat map, and where the time of a layer goes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.report.figures.panels import lines_of
from suite.report.figures.speed_up import speed_ups
from suite.report.material import Material
from suite.report.methods import dense_rows, method_order
from suite.report.objects import ReportFigure
from suite.report.results import CHOICE
from suite.report.speed import speed_label
from suite.report.style import WIDTH, new_figure

_SETTING = ["level", "dtype", "batch_size", "threads", "cache", "device_name", "backend", "clock"]
_HEAT = "viridis"
# light to dark in the order of the phases; "wait" in grey: nothing is read
_PHASES = {"first packet": "#a2d4ec", "z = V x": "#73bfe2", "choose": "#46abdb", "logits": "#46abdb"}
_PHASES |= {"dense and active rows": "#2a8ebd", "active rows": "#12719e", "wait": "#9d9d9d", "sum of y": "#fdbf11"}


def efficiencies(material: Material) -> pd.DataFrame:
    """Efficiency of every timed sparse row of a shape that is one of several in its setting."""
    frame = speed_ups(material)
    frame = frame[~dense_rows(frame) & (frame["variant"] == "eager") & (frame["level"] != "decode")]
    several = frame.groupby(_SETTING, dropna=False)["model_shape"].transform("nunique") > 1
    return frame[several.astype(bool)]


def phases(material: Material) -> pd.DataFrame:
    """Phases of every traced kernel, with the row they belong to; none of a kernel whose clock rate was mismeasured (< 0)."""
    layers = material.speed[material.speed["level"] != "decode"]
    speed = layers[["cell_id", "model_shape", "dtype", "batch_size", "method", *CHOICE, "sparsity_target"]]
    merged = material.results.phases.merge(speed, on="cell_id", how="inner")
    merged = merged[merged.groupby("cell_id")["us_median"].transform("min") >= 0].copy()
    merged["_order"] = merged.groupby("cell_id", sort=False).cumcount()
    merged["_method"] = merged["method"].map(method_order)
    merged = merged.sort_values(["model_shape", "_method", "sparsity_target", "_order"], kind="stable")
    merged["bar"] = [f"{speed_label(row)}, s={row['sparsity_target']:g}" for _, row in merged.iterrows()]
    return merged


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


FIGURES = (
    ReportFigure(
        "efficiency",
        "Efficiency (needed bytes over time x the read bandwidth of the run; 1 is the limit of memory) by shape and sparsity.",
        [*_SETTING, "model_shape", "method", "label", "sparsity_target", "sparsity_realized", "efficiency"],
        efficiencies,
        draw_efficiency,
    ),
    ReportFigure(
        "phases",
        "Where the time of a layer goes: median over all blocks of each phase, by their own clocks, from the end of the layer "
        "in front on.",
        ["cell_id", "model_shape", "dtype", "batch_size", "bar", "phase", "us_median", "us_q05", "us_q95"],
        phases,
        draw_phases,
    ),
)
