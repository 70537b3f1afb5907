"""Figures of whole models that decode: tokens per second, where a token's time goes, and where sparsity breaks even."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.report.figures.panels import DASHED, lines_of
from suite.report.figures.speed_up import FEWEST
from suite.report.material import Material
from suite.report.methods import dense_rows, is_dense, method_order
from suite.report.objects import ReportFigure
from suite.report.results import CHOICE, DECODED
from suite.report.speed import PROBES, speed_label, speed_labels
from suite.report.style import DENSE, WIDTH, label_ends, look, new_figure

_LINE = ["level", *DECODED, "method", "label"]
_TOKENS = ["sparsity_target", "sparsity_realized", "tokens_per_s", "bound_tokens_per_s", "speed_up"]
_PARTS = {"MLP": "#12719e", "attention": "#73bfe2", "head": "#fdbf11", "rest": "#9d9d9d"}


def decode_tokens(material: Material) -> pd.DataFrame:
    """Tokens per second of every decode row that is ok, and what the run's read bandwidth would allow at its bytes."""
    speed = material.speed
    rows = speed[(speed["level"] == "decode") & (speed["status"] == "ok")]
    bound = rows["read_bandwidth_gb_s"] * 1e9 / (rows["bytes_read_mib"] * 2**20)
    return rows.assign(label=speed_labels(rows), bound_tokens_per_s=bound)


def decode_phases(material: Material) -> pd.DataFrame:
    """Parts of a token's time with the row they belong to."""
    rows = material.speed[material.speed["level"] == "decode"]
    merged = material.results.phases.merge(
        rows[[*DECODED, "cell_id", "method", *CHOICE, "sparsity_target"]], on="cell_id", how="inner"
    )
    merged["_method"] = merged["method"].map(method_order)
    merged = merged.sort_values([*DECODED, "_method", "sparsity_target"], kind="stable")
    merged["bar"] = [
        speed_label(row) if is_dense(row["method"]) else f"{speed_label(row)}, s={row['sparsity_target']:g}"
        for _, row in merged.iterrows()
    ]
    return merged


def break_even(material: Material) -> pd.DataFrame:
    """Realised sparsity from which a method is faster than the fastest dense row, between the rows around speed-up 1.

    Of whole models that decode, and of layers timed at four sparsities or more. ``at`` is NaN where none is faster;
    ``below`` says that already the least sparsity timed is faster, and ``at`` is it (of a single one that says nothing,
    and it is left out).
    """
    speed = material.speed
    rows = speed[~dense_rows(speed) & (speed["status"] == "ok") & speed["speed_up"].notna()]
    rows = rows[rows["level"].isin(["decode", "layer"]) & ~rows["variant"].isin(PROBES) & (rows["clock"] != "event")]
    rows = rows.assign(label=speed_labels(rows))
    found: list[dict[str, Any]] = []
    for values, group in rows.groupby(_LINE, dropna=False, sort=False):
        if values[0] == "layer" and group["sparsity_target"].nunique() < FEWEST:
            continue
        line = group.sort_values("sparsity_realized")
        x, y = (line[c].to_numpy(dtype=float) for c in ("sparsity_realized", "speed_up"))
        slower = np.flatnonzero(y < 1)
        last = int(slower[-1]) if len(slower) else -1
        if last < 0 and len(x) == 1:
            continue
        at = x[0] if last < 0 else np.nan
        if 0 <= last < len(x) - 1:
            at = x[last] + (1 - y[last]) / (y[last + 1] - y[last]) * (x[last + 1] - x[last])
        found.append(dict(zip(_LINE, values, strict=True)) | {"at": at, "below": last < 0})
    return pd.DataFrame(found, columns=[*_LINE, "at", "below"])


def _title(row: pd.Series) -> str:
    decode = row.get("level", "decode") == "decode"
    what = f"context {row['context_tokens']}" if decode else f"layer, batch {row['batch_size']}"
    threads = "" if row["threads"] in ("", "0") else f", {row['threads']} threads"
    return f"{row['model_shape']}, {row['dtype']}, {what}{threads}"


def _panels(data: pd.DataFrame) -> list[pd.DataFrame]:
    groups = [group for _, group in data.groupby(DECODED, sort=False, dropna=False)]

    def place(group: pd.DataFrame) -> tuple[bool, str, int]:
        shape = str(group["model_shape"].iloc[0])
        return shape == "embedded", shape, int(group["context_tokens"].iloc[0] or 0)

    return sorted(groups, key=place)


def draw_decode_tokens(data: pd.DataFrame) -> Figure | None:
    """Tokens per second against realised sparsity, the byte bound dashed, dense as lines across; a panel per model."""
    panels = [group for group in _panels(data) if not dense_rows(group).all()]
    lines = [group for group in panels if group.loc[~dense_rows(group), "sparsity_target"].nunique() > 1]
    panels = lines or panels
    if not panels:
        return None
    n_rows = -(-len(panels) // 2)
    figure = new_figure(WIDTH, 2.4 * n_rows)
    grid = list(figure.subplots(n_rows, min(2, len(panels)), squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for group, axes in zip(panels, grid, strict=False):
        _tokens_panel(axes, group)
    return figure


def _tokens_panel(axes: Axes, group: pd.DataFrame) -> None:
    ends = []
    for label, method, rows in lines_of(group):
        line = rows.sort_values("sparsity_realized")
        style, x = look(method), line["sparsity_realized"].to_numpy(dtype=float)
        axes.plot(x, line["tokens_per_s"], color=style.color, marker=style.marker, zorder=3)
        dash: dict[str, Any] = {"marker": "_", "markersize": 10} if len(x) == 1 else {}  # one point has no line
        axes.plot(x, line["bound_tokens_per_s"], color=style.color, **DASHED, **dash)
        ends.append((float(x[-1]), float(line["tokens_per_s"].iloc[-1]), label, style.color))
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 1)
    for _, row in group[dense_rows(group)].iterrows():
        axes.axhline(row["tokens_per_s"], color="black", linewidth=1.0, zorder=1)
        ends.append((axes.get_xlim()[1], float(row["tokens_per_s"]), f"{DENSE} {row['variant']}", "black"))
    axes.set_ylim(axes.get_ylim())
    label_ends(axes, ends, 2.4)
    axes.set_title(_title(group.iloc[0]))
    axes.set_xlabel("realised sparsity (dashed: byte bound)")
    axes.set_ylabel("tokens per second")


def draw_decode_phases(data: pd.DataFrame) -> Figure:
    """Milliseconds of a token in attention, MLP, head and the rest, stacked; a bar per method and sparsity.

    Of every model the first context.
    """
    first: dict[tuple[Any, ...], pd.DataFrame] = {}
    for group in _panels(data):
        first.setdefault(tuple(group.iloc[0][[c for c in DECODED if c != "context_tokens"]]), group)
    panels = list(first.values())
    bars = [group["bar"].nunique() for group in panels]
    figure = new_figure(WIDTH, sum(0.7 + 0.2 * n for n in bars) + 0.3)
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [0.7 + 0.2 * n for n in bars]})
    for group, axes in zip(panels, grid.flat, strict=True):
        names = list(dict.fromkeys(group["bar"]))
        at = np.zeros(len(names))
        for part, color in _PARTS.items():
            of = group[group["phase"] == part].set_index("bar")["us_median"]
            width = np.array([float(of.get(name, 0.0)) / 1000 for name in names])
            axes.barh(range(len(names)), width, left=at, color=color, height=0.7, label=part)
            at += width
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_title(_title(group.iloc[0]))
        axes.set_xlabel("milliseconds of a token, each part timed alone; rest: the token's time less the parts")
    grid.flat[0].legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), fontsize=6)
    return figure


def draw_break_even(data: pd.DataFrame) -> Figure | None:
    """Break-even sparsity of every method, a line of points per model or layer; an open point: below what was timed."""
    known = data[data["at"].notna()]
    if known.empty:
        return None
    titles = [_title(row) for _, row in data.iterrows()]
    order = list(dict.fromkeys(titles))
    figure = new_figure(WIDTH, 0.9 + 0.25 * len(order))
    axes = figure.subplots()
    shown: set[str] = set()
    for title, (_, row) in zip(titles, data.iterrows(), strict=True):
        style = look(str(row["method"]))
        label = None if row["label"] in shown or np.isnan(row["at"]) else str(row["label"])
        shown.add(str(row["label"]))
        face = "white" if row["below"] else style.color
        axes.plot(
            row["at"], order.index(title), linestyle="", marker=style.marker, color=style.color, markerfacecolor=face,
            label=label,
        )  # fmt: skip
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("realised sparsity from which it is faster than dense (open: at most this)")
    axes.legend(fontsize=6)
    return figure


FIGURES = (
    ReportFigure(
        "decode_tokens",
        "Tokens per second of whole models, batch 1, greedy, in one loop that differs in the MLP alone. Dashed: what the read "
        "bandwidth of the run allows at the bytes of a token. Dense also by transformers' own generate. Contexts with a "
        "single sparsity are in the table.",
        [*DECODED, "method", "label", "variant", *_TOKENS],
        decode_tokens,
        draw_decode_tokens,
    ),
    ReportFigure(
        "decode_phases",
        "Where a token's time goes: all attentions, all MLPs and the head, each timed alone, and the rest. Of every model the "
        "first context; phases.csv has all.",
        [*DECODED, "bar", "phase", "us_median"],
        decode_phases,
        draw_decode_phases,
    ),
    ReportFigure(
        "break_even",
        "Where sparsity does not pay: left of a point a layer (timed at four sparsities or more) or a token of a whole model "
        "takes longer than with the fastest dense row; no point: at every sparsity that was timed.",
        [*_LINE, "at", "below"],
        break_even,
        draw_break_even,
    ),
)
