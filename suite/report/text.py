"""Markdown tables, CSV and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from suite.report.quality import Interval

MISSING = "–"  # noqa: RUF001  (an en dash, as printed tables have it)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table, first column left, others right; a bar or a line break in a cell would be a new cell or row."""
    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    cells = ([" ".join(cell.replace("|", "&#124;").splitlines()) for cell in row] for row in (header, *rows))
    first, *others = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join((first, rule, *others)) + "\n"


def csv_text(frame: pd.DataFrame) -> str:
    """A frame as CSV, numbers with ten digits."""
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def without_html(text: str) -> str:
    """Markdown in which no name is a tag: the suite's own text has none, so that every ``<`` and ``>`` is escaped."""
    return text.replace("<", "&lt;").replace(">", "&gt;")


def fixed(value: float | None, digits: int) -> str:
    """Number with so many decimals, a dash where there is none."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Share as percent without sign, a dash where there is none."""
    return MISSING if value is None else fixed(100 * value, digits)


def perplexity_text(value: float) -> str:
    """Perplexity with four significant digits or all before the point."""
    return fixed(value, 2 if value < 100 else 1 if value < 1000 else 0)


def microseconds(value: float) -> str:
    """Microseconds with three significant digits at least."""
    return fixed(value, 1 if value < 1000 else 0)


def signed(interval: Interval | None, scale: float = 100.0, digits: int = 1) -> str:
    """Difference with its interval: ``-3.2 [-6.1, -0.4]``."""
    if interval is None:
        return MISSING
    value, low, high = (None if end is None else scale * end for end in interval)
    if value is None or low is None or high is None:
        return MISSING if value is None else f"{value:+.{digits}f}"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Names in a row, the rest as a count."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def own_name(model: str) -> str:
    """A model's name without the owner, folder or revision that tells it from others of the run."""
    return model.partition("@")[0].rpartition("/")[2]
