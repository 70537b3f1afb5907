"""Figure of trained predictors, layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.report.figures.panels import DASHED, finish, rows_of_two
from suite.report.material import Material
from suite.report.objects import ReportFigure
from suite.report.style import look

_SHOWN = 0.8  # the sparsity of the figure, if the run has it
_LAYER = ["model", "method", "sparsity_target", "layer"]
_MEANS = ["mass_kept", "mass_kept_ideal", "overlap_at_k", "sparsity_realized"]


def predictor_layers(material: Material) -> pd.DataFrame:
    """Means over the fits of each model and method at one sparsity, .8 where the run has it, layer by layer."""
    rows = material.results.predictor
    targets = sorted(rows["sparsity_target"].unique(), key=lambda target: abs(target - _SHOWN))
    own = rows[rows["sparsity_target"] == targets[0]] if targets else rows
    own = own.assign(layer=pd.to_numeric(own["layer"]))
    return own.groupby(_LAYER, as_index=False)[_MEANS].mean()


def draw_predictor_layers(data: pd.DataFrame) -> Figure:
    """Mass of v^2 kept, dashed what the true top k keeps, and overlap with it, layer by layer; a row per model."""
    models = list(dict.fromkeys(data["model"]))
    figure, grid = rows_of_two(len(models))
    for model, (mass, overlap) in zip(models, grid, strict=True):
        own = data[data["model"] == model]
        target = f"sparsity {own['sparsity_target'].iloc[0]:g}"
        _panel(mass, own, "mass_kept", f"sum of v² kept at {target}, %", dashed="mass_kept_ideal")
        _panel(overlap, own, "overlap_at_k", f"overlap with the true top k at {target}, %")
        mass.set_title(model)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, column: str, name: str, dashed: str | None = None) -> None:
    ends = []
    for method, line in rows.groupby("method", sort=True):
        line, style = line.sort_values("layer"), look(str(method))
        x, y = line["layer"].to_numpy(dtype=float), 100 * line[column].to_numpy(dtype=float)
        axes.plot(x, y, color=style.color, marker=style.marker, markersize=3)
        if dashed is not None:
            axes.plot(x, 100 * line[dashed], color=style.color, **DASHED)
        ends.append((float(x[-1]), float(y[-1]), str(method), style.color))
    axes.set_ylabel(name)
    finish(axes, ends, "layer")


FIGURES = (
    ReportFigure(
        "predictors",
        "Predictors on held-out documents, means over the fits of a method at one sparsity. Left: share of the sum of v^2 "
        "that is kept, dashed what the true top k keeps. Right: share of the true top k among the k largest logits.",
        [*_LAYER, *_MEANS],
        predictor_layers,
        draw_predictor_layers,
    ),
)
