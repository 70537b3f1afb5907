"""Trained predictors: a table of their means over layers, and a figure layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.report.load import Results
from suite.report.style import WIDTH, label_ends, look, new_figure
from suite.report.text import MISSING, fixed, markdown_table

_SHOWN = 0.8  # the sparsity of the figure, if the run has it
_MEANS = ("sparsity_realized", "recall", "precision", "overlap_at_k", "mass_kept", "mass_kept_ideal")
_NUMBERS = [*_MEANS, "layer", "sparsity_target", "train_tokens", "loss", "fit_s", "peak_memory_mib"]


def predictor_rows(results: Results) -> pd.DataFrame:
    """Rows of predictor.csv with numbers as numbers and the text and seed of each fit."""
    rows = results.predictor.copy()
    rows[_NUMBERS] = rows[_NUMBERS].apply(pd.to_numeric)
    fits = results.accuracy[["fit_id", "estimator", "calibration", "seed"]].drop_duplicates("fit_id")
    rows["rank"] = rows["rank"].astype(str).replace("nan", "")
    found = rows.merge(fits, on="fit_id", how="left")
    names = ["estimator", "calibration", "seed"]
    return found.assign(**{name: found[name].astype(object).where(found[name].notna(), MISSING) for name in names})


def predictor_table(results: Results) -> str:
    """Markdown table, one row a predictor; empty without any."""
    rows = predictor_rows(results)
    if rows.empty:
        return ""
    in_domain = results.manifest.get("in_domain") or {}
    lines = []
    by = ["model", "method", "sparsity_target", "predictor", "rank", "calibration", "estimator", "seed", "fit_id"]
    for key, layers in rows.groupby(by, sort=True, dropna=False):
        model, method, target, predictor, rank, calibration, estimator, seed, _ = key
        means = [fixed(float(layers[name].mean()), 3) for name in _MEANS]
        domain = "in domain" if in_domain.get(calibration) else "out of domain"
        kind = f"{predictor} {rank}".strip()
        text = calibration if calibration == MISSING else f"{calibration} ({domain})"
        cost = [f"{layers['train_tokens'].iloc[0]:.0f}", fixed(float(layers["fit_s"].sum()), 1)]
        peak = fixed(float(layers["peak_memory_mib"].iloc[0]), 0)
        lines.append([f"{method} {target:g}", str(model), kind, text, str(estimator), str(seed), *means, *cost, peak])
    header = ["predictor of", "model", "kind", "fitted on", "threshold", "seed", "realised", "recall", "precision"]
    header += ["overlap@k", "mass kept", "ideal", "tokens", "fit s", "peak MiB"]
    return (
        "# Predictors\n\nMeans over layers on documents that neither matrices nor thresholds were fitted on, all earlier "
        "layers being sparse. Mass: share of the sum of v^2 that is kept, by the predictor and by the true top k; it, not "
        "recall, decides the output. Time: the training's share of this predictor, without the passes of the model. What "
        "each choice of training is worth: `suite/fitting/NOTES.md`.\n\n" + markdown_table(header, lines)
    )


def predictor_layers(results: Results) -> pd.DataFrame:
    """Means over the fits of each model and method at one sparsity, .8 where the run has it, layer by layer."""
    rows = predictor_rows(results)
    if rows.empty:
        return rows
    targets = sorted(rows["sparsity_target"].unique(), key=lambda target: abs(target - _SHOWN))
    own = rows[rows["sparsity_target"] == targets[0]]
    by = ["model", "method", "sparsity_target", "layer"]
    return own.groupby(by, as_index=False)[["mass_kept", "mass_kept_ideal", "overlap_at_k", "sparsity_realized"]].mean()


def draw_predictor_layers(data: pd.DataFrame) -> Figure:
    """Mass of v^2 kept, dashed what the true top k keeps, and overlap with it, layer by layer; a row per model."""
    models = list(dict.fromkeys(data["model"]))
    figure = new_figure(WIDTH, 2.8 * len(models))
    for model, (mass, overlap) in zip(models, figure.subplots(len(models), 2, squeeze=False), strict=True):
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
            axes.plot(x, 100 * line[dashed], color=style.color, linestyle=(0, (3, 1.5)), linewidth=0.9)
        ends.append((float(x[-1]), float(y[-1]), str(method), style.color))
    axes.set_xlabel("layer")
    axes.set_ylabel(name)
    axes.margins(x=0.03)
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    label_ends(axes, ends, 2.2)
