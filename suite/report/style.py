"""The one style of all figures: Okabe-Ito colours, a marker of its own for every method, deterministic files."""

from __future__ import annotations

import io
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from suite.files import write_atomically

# Okabe & Ito (2008): told apart with any colour vision deficiency; with the markers also in grey print.
_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a name may have a $ in it
    "svg.hashsalt": "countdown-suite",
    "svg.fonttype": "path",
}
WIDTH = 7.2  # inches: a text block of two columns


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of one method."""

    color: str
    marker: str
    line: str = "-"


LOOKS = {
    "dense": Look("#000000", "", "-"),
    "random": Look("#999999", "", "-"),
    "static": Look("#777777", "1"),
    "griffin": Look("#8c564b", "<"),
    "dejavu": Look("#CC79A7", "v"),
    "dejavu-abs": Look("#D55E00", "^"),
    "cats": Look("#E69F00", "s"),
    "chess": Look("#b8860b", "p"),
    "m-countdown": Look("#0072B2", "o"),
    "m-countdown-cw": Look("#332288", "h"),
    "md-countdown": Look("#882255", "*"),
    "d-countdown": Look("#009E73", "D"),
    "s-countdown": Look("#56B4E9", "P"),
    "given": Look("#7a5195", "X"),
}
DENSE = "dense"  # its label
# What the analysis of coefficients measures: its symbol, and the method that ranks by it and lends its look.
QUANTITIES = {
    "abs_up": ("|u|", "m-countdown"),
    "abs_act": ("|act(g)|", "cats"),
    "abs_product": ("|v|", "d-countdown"),
}
_OTHERS = (Look("#a0522d", "d"), Look("#2f4b7c", ">"), Look("#665191", "H"), Look("#556b2f", "8"))


def styled() -> AbstractContextManager[None]:
    """Context in which figures are made and saved; the user's own matplotlib settings do not enter."""
    defaults = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")}
    return mpl.rc_context(defaults | _RC)


def look(method: str) -> Look:
    """Look of a method; methods from anywhere get one of four more by their name."""
    return LOOKS.get(method) or _OTHERS[sum(map(ord, method)) % len(_OTHERS)]


def new_figure(width: float, height: float) -> Figure:
    """Empty figure with constrained layout, drawn without a display or global state."""
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem.png`` and ``stem.svg`` with no date and no version in them: equal data give equal bytes."""
    with styled():
        # the canvases' own printers draw once each; figure.savefig draws twice, and layout and text are what costs
        png: Any = FigureCanvasAgg(figure)
        image = io.BytesIO()
        png.print_png(image, metadata={"Software": None})
        write_atomically(stem.with_suffix(".png"), image.getvalue())
        figure.set_layout_engine("none")  # laid out above
        buffer = io.StringIO()
        svg: Any = FigureCanvasSVG(figure)
        svg.print_svg(buffer, metadata={"Date": None, "Creator": None})
        lines = (line.rstrip() for line in buffer.getvalue().splitlines())
        write_atomically(stem.with_suffix(".svg"), ("\n".join(lines) + "\n").encode())


def plain_log(axes: Axes) -> None:
    """Numbers as one writes them on a log axis, minor ones too where less than two decades are shown."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    few = high / low < 100
    sparse = FuncFormatter(lambda v, _: f"{v:g}" if round(v / 10 ** math.floor(math.log10(v))) in (2, 5) else "")
    axes.yaxis.set_minor_formatter(sparse if few else NullFormatter())


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], height: float, size: float = 7.0) -> None:
    """Write names beside the axes at the height of the lines' last points, pushed apart so that none overlap.

    Parameters
    ----------
    axes : Axes
        Its limits must be final.
    ends : list of (x, y, text, color)
        Last point of each line in data coordinates.
    height : float
        Height of the axes in inches, roughly.
    size : float
        Font size in points.
    """
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    fractions = [float(to_axes.transform((x, y))[1]) for x, y, _, _ in ends]
    gap = size * 1.25 / 72 / height
    order = np.argsort(fractions, kind="stable")
    places = spread([fractions[i] for i in order], gap)
    for index, place in zip(order, places, strict=True):
        x, y, text, color = ends[index]
        axes.annotate(
            text,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=color,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.55, "shrinkA": 1, "shrinkB": 3},
        )


def spread(places: list[float], gap: float) -> list[float]:
    """Sorted places moved as little as needed to lie at least ``gap`` apart, clusters kept on their centre."""
    clusters: list[tuple[float, int]] = []  # centre, members
    for place in places:
        centre, members = place, 1
        while clusters and centre - (members - 1) * gap / 2 < clusters[-1][0] + (clusters[-1][1] + 1) * gap / 2:
            last, count = clusters.pop()
            centre, members = (last * count + centre * members) / (count + members), count + members
        clusters.append((centre, members))
    return [centre + (i - (members - 1) / 2) * gap for centre, members in clusters for i in range(members)]
