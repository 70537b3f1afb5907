"""Figure of the realised sparsity, layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from suite.methods.base import NEURONS
from suite.report.figures.panels import CHANCE, finish, groups
from suite.report.material import Material
from suite.report.objects import ReportFigure
from suite.report.style import WIDTH, look, new_figure

COLUMNS = ["model", "mode", "method", "label", "sparsity_target", "layer", "sparsity_realized"]


def sparsity_per_layer(material: Material) -> pd.DataFrame:
    """Realised sparsity of every layer at every site, mean over the cells of a setting weighted by their tokens.

    A line for each site of a method; the label names those that are not the neurons.
    Practical settings; ideal ones, which realise exactly k, only where there is no practical one.
    """
    rows = material.quality.rows
    modes = ["practical"] if (rows["mode"] == "practical").any() else ["ideal"]
    cells = rows[rows["mode"].isin(modes)].drop_duplicates("cell_id")
    layers = material.results.sparsity.drop(columns=["sparsity_target"])
    merged = layers.merge(cells[["cell_id", "model", "mode", "method", "label", "sparsity_target"]], on="cell_id")
    if merged.empty:
        return pd.DataFrame(columns=COLUMNS)
    merged = merged.assign(
        label=merged["label"].where(merged["site"] == NEURONS, merged["label"] + " " + merged["site"]),
        layer=merged["layer"].astype(int),
        n_tokens=merged["n_tokens"].fillna(1.0),
        weighted=merged["sparsity_realized"] * merged["n_tokens"].fillna(1.0),
    )
    keys = [c for c in COLUMNS if c != "sparsity_realized"]
    sums = merged.groupby(keys, sort=True)[["weighted", "n_tokens"]].sum()
    sums = sums[sums["n_tokens"] > 0]
    return (sums["weighted"] / sums["n_tokens"]).rename("sparsity_realized").reset_index()


def draw_sparsity_per_layer(data: pd.DataFrame) -> Figure:
    """Realised sparsity of every layer, targets dotted; a panel per model."""
    panels = groups(data, "model", "mode")
    figure = new_figure(WIDTH, 3.0 * len(panels))
    grid = figure.subplots(len(panels), 1, squeeze=False)
    for ((model, mode), group), axes in zip(panels, grid.flat, strict=True):
        ends = []
        for (label, target), rows in group.groupby(["label", "sparsity_target"], sort=False):
            method, rows = str(rows["method"].iloc[0]), rows.sort_values("layer")
            style = look(method)
            axes.plot(rows["layer"], rows["sparsity_realized"], color=style.color, marker=style.marker, markersize=3)
            last = rows.iloc[-1]
            ends.append((float(last["layer"]), float(last["sparsity_realized"]), f"{label}, {target:g}", style.color))
        for target in sorted(set(group["sparsity_target"])):
            axes.axhline(target, zorder=1, **CHANCE)
        finish(axes, ends, "layer", margin=0.01, height=2.4)
        axes.set_title(f"{model}, {mode}")
        axes.set_ylabel("realised sparsity (dotted: target)")
    return figure


FIGURES = (
    ReportFigure(
        "sparsity_per_layer",
        "Realised sparsity per layer against the target.",
        COLUMNS,
        sparsity_per_layer,
        draw_sparsity_per_layer,
    ),
)
