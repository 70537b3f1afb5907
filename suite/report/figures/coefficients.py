"""Figures of the analysis: kept sets on generated tokens, and how the coefficients are spread over neurons."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite import schema
from suite.report.claims import INDIRECT
from suite.report.figures.panels import DASHED, finish, rows_of_two
from suite.report.objects import ReportFigure
from suite.report.style import QUANTITIES, look, plain_log

_FAULTY = dict(zip(INDIRECT, reversed(INDIRECT), strict=True))  # a row of one method counts the other's mistakes


def draw_cif_caf(data: pd.DataFrame) -> Figure:
    """What CATS and M-COUNTDOWN miss of D-COUNTDOWN's kept set and keep beside it, against sparsity; a row per model."""
    models = list(dict.fromkeys(data["model"]))
    figure, grid = rows_of_two(len(models))
    for model, (alive, dead) in zip(models, grid, strict=True):
        own = data[data["model"] == model]
        _kept_panel(alive, own, "cif_alive", "caf_alive", "missed by")
        _kept_panel(dead, own, "cif_dead", "caf_dead", "needless in")
        alive.set_title(model)
        alive.set_ylabel("share of D, %")
        dead.set_ylabel("share of the neurons outside D, %")
    return figure


def _kept_panel(axes: Axes, rows: pd.DataFrame, all_of: str, repaired: str, verb: str) -> None:
    """Lines in the colour of the method whose mistakes they count: the row method's opponent."""
    ends = []
    for method, line in rows.groupby("row_method", sort=True):
        line, faulty = line.sort_values("sparsity"), _FAULTY[str(method)]
        style, x = look(faulty), line["sparsity"].to_numpy(dtype=float)
        axes.plot(x, 100 * line[all_of], color=style.color, marker=style.marker)
        axes.plot(x, 100 * line[repaired], color=style.color, **DASHED)
        ends.append((float(x[-1]), 100 * float(line[all_of].iloc[-1]), f"{verb} {faulty}", style.color))
    finish(axes, ends, "sparsity")


def draw_activations(data: pd.DataFrame) -> Figure:
    """Mass of v^2 that each ranking keeps at .8, and the spread of what it ranks by, layer by layer; a row per model."""
    models = list(dict.fromkeys(data["model"]))
    figure, grid = rows_of_two(len(models))
    for model, (mass, spread) in zip(models, grid, strict=True):
        _mass_panel(mass, data[data["model"] == model])
        _spread_panel(spread, data[data["model"] == model])
        mass.set_title(model)
    return figure


def _mass_panel(axes: Axes, rows: pd.DataFrame) -> None:
    ends = []
    for quantity, (_, method) in QUANTITIES.items():
        line, style = _layers(rows, quantity), look(method)
        axes.plot(line["layer"], 100 * line["mass_kept_at_80"], color=style.color, marker=style.marker, markersize=3)
        ends.append((float(line["layer"].iloc[-1]), 100 * float(line["mass_kept_at_80"].iloc[-1]), method, style.color))
    axes.set_ylabel("sum of v² kept at sparsity .8, %")
    finish(axes, ends, "layer")


def _spread_panel(axes: Axes, rows: pd.DataFrame) -> None:
    ends = []
    axes.set_yscale("log")
    for quantity, (symbol, method) in QUANTITIES.items():
        line, style = _layers(rows, quantity), look(method)
        axes.fill_between(line["layer"], line["q05"], line["q95"], color=style.color, alpha=0.13, linewidth=0)
        axes.plot(line["layer"], line["q50"], color=style.color, marker=style.marker, markersize=3)
        ends.append((float(line["layer"].iloc[-1]), float(line["q50"].iloc[-1]), symbol, style.color))
    axes.set_ylabel("median, 5th to 95th percentile")
    finish(axes, ends, "layer")
    plain_log(axes)


def _layers(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    own = rows[rows["quantity"] == quantity]
    return own.assign(layer=own["layer"].astype(int)).sort_values("layer")


FIGURES = (
    ReportFigure(
        "cif_caf",
        "Generated tokens, kept set D of D-COUNTDOWN (ideal) against CATS and M-COUNTDOWN at equal sparsity. Left, share of "
        "D: solid, missed by one method; dashed, missed by it and kept by the other. Right, share of the neurons outside D: "
        "solid, kept needlessly by one method; dashed, kept by it and dropped by the other.",
        schema.CIF_CAF.names,
        lambda material: material.results.cif_caf,
        draw_cif_caf,
    ),
    ReportFigure(
        "activations",
        "Why the methods differ, layer by layer on generated tokens. Left: share of the sum of v^2 that each ranking keeps at "
        "sparsity .8. Right: median of |u|, |act(g)| and |v| over tokens and neurons, band from the 5th to the 95th "
        "percentile.",
        schema.ACTIVATIONS.names,
        lambda material: material.results.activations,
        draw_activations,
    ),
)
