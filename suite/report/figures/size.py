"""Figure of what is lost against the size of the model."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from suite.modeling.names import named_parameters
from suite.report.figures.panels import draw_line, groups, legend, lines_of
from suite.report.figures.quality import POINT, main_scope, perplexities, quality_averages
from suite.report.material import Material
from suite.report.methods import dense_rows, floor_rows
from suite.report.objects import ReportFigure
from suite.report.style import WIDTH, new_figure, plain_log

SPARSITIES = (0.7, 0.8, 0.9)
LOSS = "relative loss of the average"
COLUMNS = ["quantity", *POINT, "parameters", "value", "ci_low", "ci_high"]


def loss_against_size(material: Material) -> pd.DataFrame:
    """Loss of the average and headline perplexity over dense, by parameters; nothing with fewer than two models."""
    text = perplexities(material)
    headline = [t for t in dict.fromkeys(text["task"]) if t.startswith("decode_perplexity")][:1]
    averages = _over_dense(main_scope(quality_averages(material))).assign(quantity=LOSS)
    lost = averages.assign(value=1 - averages["value"], ci_low=1 - averages["ci_high"], ci_high=1 - averages["ci_low"])
    ratios = _over_dense(text[text["task"].isin(headline)])
    frames = [lost, ratios.assign(quantity=lambda frame: frame["task"] + " over dense")]
    frame = pd.concat(
        [part.reindex(columns=COLUMNS) for part in frames if not part.empty] or [pd.DataFrame(columns=COLUMNS)]
    )
    frame["parameters"] = pd.to_numeric(frame["model"].map(named_parameters))
    frame = frame[frame["parameters"].notna() & frame["sparsity_target"].isin(SPARSITIES) & ~floor_rows(frame)]
    return frame if frame["model"].nunique() > 1 else frame.iloc[:0]


def _over_dense(frame: pd.DataFrame) -> pd.DataFrame:
    """Values and ends of intervals over dense's value; dense itself is left out."""
    dense = frame[dense_rows(frame)].drop_duplicates(["model", "dtype"]).set_index(["model", "dtype"])["value"]
    sparse = frame[~dense_rows(frame)]
    top = pd.Series([dense.get(key) for key in zip(sparse["model"], sparse["dtype"], strict=True)], sparse.index, float)
    return sparse.assign(**{name: sparse[name].astype(float) / top for name in ("value", "ci_low", "ci_high")})


def draw_loss_against_size(data: pd.DataFrame) -> Figure:
    """A row per quantity and mode, a column per sparsity."""
    rows = groups(data, "quantity", "mode")
    columns = sorted(set(data["sparsity_target"]))
    figure = new_figure(WIDTH, 0.7 + 2.2 * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for ((quantity, mode), group), line in zip(rows, grid, strict=True):
        for sparsity, axes in zip(columns, line, strict=True):
            _panel(axes, group[group["sparsity_target"] == sparsity], quantity == LOSS)
            axes.set_title(f"{mode}, sparsity {sparsity:g}")
        line[0].set_ylabel(f"{quantity}, %" if quantity == LOSS else quantity.replace(" perplexity", ""), fontsize=7)
    sizes = sorted(set(data["parameters"]))
    for axes in grid[-1]:
        axes.set_xlabel("parameters")
        axes.set_xticks(sizes, [f"{size / 1e6:g}M" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
    legend(figure, data)
    return figure


def _panel(axes: Axes, panel: pd.DataFrame, is_loss: bool) -> None:
    axes.set_xscale("log")
    if not is_loss:
        axes.set_yscale("log")
    for _, method, rows in lines_of(panel):
        rows = rows.sort_values("parameters")
        draw_line(axes, method, rows["parameters"].to_numpy(dtype=float), rows, 100 if is_loss else 1)
    axes.axhline(0 if is_loss else 1, color="black", linewidth=0.8, zorder=1)
    if not is_loss:
        plain_log(axes)


FIGURES = (
    ReportFigure(
        "loss_against_size",
        "What is lost against the size of the model, as its name says it: relative loss of the task average, and the "
        "perplexity of generation over dense's (log axis). Bars: 95 % interval of the paired difference to dense. Scope "
        "`scored` where the run has several; without random.",
        COLUMNS,
        loss_against_size,
        draw_loss_against_size,
    ),
)
