"""Figure of what is kept against what is read: quality and measured speed-up by bytes per token."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.report.figures.panels import IDEAL, MODES, draw_line, groups, legend, lines_of
from suite.report.figures.quality import POINT, main_scope, perplexities, quality_averages
from suite.report.figures.speed_up import speed_ups
from suite.report.material import Material
from suite.report.methods import dense_rows, is_floor
from suite.report.objects import ReportFigure
from suite.report.results import Results
from suite.report.style import WIDTH, new_figure, plain_log
from suite.report.text import own_name

COLUMNS = ["quantity", *POINT, "value", "ci_low", "ci_high"]


def quality_against_bytes(material: Material) -> pd.DataFrame:
    """Task average, headline perplexity and, where it is of the same model, measured speed-up, by bytes per token."""
    parts = [main_scope(quality_averages(material)).assign(quantity="average")]
    text = perplexities(material)
    headline = [t for t in dict.fromkeys(text["task"]) if t.startswith("decode_perplexity")][:1]
    parts.append(text[text["task"].isin(headline)].assign(quantity=lambda f: f["task"]))
    models = set(material.quality.ok["model"])
    speed = speed_ups(material)
    speed["model"] = [
        next((m for m in sorted(models) if is_shape_of(material.results, shape, m)), own)
        for own, shape in zip(speed["model"], speed["model_shape"], strict=True)
    ]
    same = speed[speed["model"].isin(models) & ~dense_rows(speed)]
    measured = same.assign(value=same["speed_up"], ci_low=same["speed_up_low"], ci_high=same["speed_up_high"])
    measured = measured.assign(quantity="speed-up, " + same["level"], mode="practical", scope="")
    frames = [part.reindex(columns=COLUMNS) for part in (*parts, measured) if not part.empty]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def is_shape_of(results: Results, shape: str, model: str) -> bool:
    """Whether a speed row's shape is a model's own: ``gemma-2-9b`` of ``gemma-2-9b-it``, ``embedded`` of that one."""
    if shape == "embedded":
        config = results.manifest.get("config") or {}
        ids = [one.get("id") for one in config.get("models") or [] if isinstance(one, dict)]
        return ids == ["embedded"]
    return bool(shape) and own_name(model).lower().startswith(shape.lower())


def draw_quality_vs_bytes(data: pd.DataFrame) -> Figure | None:
    """What is kept against what is read: average, perplexity, and measured speed-up where it is of the same model."""
    quality = data[~data["quantity"].str.startswith("speed-up")]
    speed = data[data["quantity"].str.startswith("speed-up")]
    rows = groups(quality, "model", "dtype", "scope")
    if not rows:
        return None
    lines: list[tuple[str, list[tuple[str, pd.DataFrame]]]] = []  # measured speed-ups stand in a row of their own
    for (model, _, scope), group in rows:
        title = f"{model} (scope {scope})" if scope else model
        lines.append((title, [(quantity, own) for (quantity,), own in groups(group, "quantity")]))
        measured = speed[speed["model"] == model]
        if not measured.empty:
            title = f"{model}, measured"
            lines.append((title, [(quantity, own) for (quantity,), own in groups(measured, "quantity")]))
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
    legend(figure, data, modes=True)
    return figure


def _bytes_panel(axes: Axes, panel: pd.DataFrame, quantity: str) -> None:
    average = quantity == "average"
    scale = 100 if average else 1
    if not average:
        axes.set_yscale("log")
    for mode in MODES:
        for _, method, rows in lines_of(panel[panel["mode"] == mode]):
            rows = rows.sort_values("bytes_share")
            more = IDEAL if mode == "ideal" and not is_floor(method) else {}
            draw_line(axes, method, 100 * rows["bytes_share"].to_numpy(dtype=float), rows, scale, **more)
    dense = panel[dense_rows(panel)]
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
        draw_line(axes, method, 100 * rows["bytes_share"].to_numpy(dtype=float), rows)
    axes.axhline(1, color="black", linewidth=0.8, zorder=1)
    axes.plot([100], [1], color="black", marker="*", markersize=8, zorder=4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{quantity} over dense")


FIGURES = (
    ReportFigure(
        "quality_vs_bytes",
        "Quality against MLP bytes per token at the realised sparsity, what a user decides by. Ideal methods know the active "
        "set for free: no predictor's bytes are in them. Measured speed-up only where it is of the same model. Scope "
        "`scored` where the run has several.",
        COLUMNS,
        quality_against_bytes,
        draw_quality_vs_bytes,
    ),
)
