"""Figure of speed-ups against sparsity, with the bound that the bytes set."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from suite.report.figures.panels import lines_of
from suite.report.material import Material
from suite.report.methods import dense_rows
from suite.report.objects import ReportFigure
from suite.report.results import SHAPE
from suite.report.speed import PROBES, speed_labels
from suite.report.style import DENSE, WIDTH, label_ends, look, new_figure

FEWEST = 4  # sparsities of a panel of speed-ups; shorter lines stand in the tables
COLUMNS = [*SHAPE, "method", "label", "rank", "backend", "variant", "clock", "sparsity_target", "sparsity_realized"]
COLUMNS += ["latency_us_median", "speed_up", "speed_up_low", "speed_up_high", "bytes_share", "bound", "efficiency"]


def speed_ups(material: Material) -> pd.DataFrame:
    """Speed-up of every timed sparse row, with the bound at the read bandwidth of the run; dense rows for reference."""
    frame = material.speed
    ok = frame[(frame["status"] == "ok") & frame["speed_up"].notna()]
    return ok.assign(label=speed_labels(ok))[COLUMNS].reset_index(drop=True)


def draw_speedup_vs_sparsity(data: pd.DataFrame) -> Figure | None:
    """Speed-up over the fastest dense against sparsity, the byte bound dashed; a panel per shape."""
    sparse = data[~dense_rows(data) & ~data["variant"].isin(PROBES)]
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
    label_ends(axes, [*ends, (axes.get_xlim()[1], 1.0, DENSE, "black")], 2.4)
    first = group.iloc[0]
    axes.set_title(
        f"{first['model_shape'] or first['model']}, {first['level']}, {first['dtype']}, batch {first['batch_size']}"
    )
    axes.set_xlabel("realised sparsity (dashed: byte bound)")
    axes.set_ylabel("speed-up over fastest dense")


FIGURES = (
    ReportFigure(
        "speedup_vs_sparsity",
        "Speed-up over the fastest dense row of the same run and shape; band: between quartiles; dashed: bound, the row's "
        "bytes at the read bandwidth measured in the run.",
        COLUMNS,
        speed_ups,
        draw_speedup_vs_sparsity,
    ),
)
