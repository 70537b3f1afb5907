"""What the report asks of a method: its place in tables and legends, whether it is the dense reference or the floor.

Asked of the registry's methods alone: a report is made of files, and a name in a file is not imported.
"""

from __future__ import annotations

from functools import cache

import pandas as pd

from suite.registry import METHODS, method_class


@cache
def _modes(method: str) -> tuple[str, ...]:
    return method_class(method).modes if method in METHODS else ("ideal", "practical")


def is_dense(method: str) -> bool:
    """Whether a method keeps every neuron: it has no ranking, so no mode. The ceiling of every table."""
    return _modes(method) == ("none",)


def is_floor(method: str) -> bool:
    """Whether a method is there for reference alone: a ranking, but no practical mode. The floor of every table."""
    return _modes(method) == ("ideal",)


def dense_rows(frame: pd.DataFrame) -> pd.Series:
    """Mask of the rows of :func:`is_dense` methods."""
    return frame["method"].map(is_dense).astype(bool)


def floor_rows(frame: pd.DataFrame) -> pd.Series:
    """Mask of the rows of :func:`is_floor` methods."""
    return frame["method"].map(is_floor).astype(bool)


def method_order(method: str) -> tuple[int, str]:
    """Sort key: the registry's order (ceiling, floor, baselines, COUNTDOWN), then others by name."""
    names = list(METHODS)
    return (names.index(method) if method in names else len(names), method)
