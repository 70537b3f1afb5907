"""What the report asks of a method: its place in tables and legends, whether it is the dense reference or the floor.

Asked of the registry's methods alone: a report is made of files, and a name in a file is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pandas as pd

from suite.methods.base import THIS_SUITE
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


def sources(methods: Iterable[str]) -> tuple[list[str], list[str]]:
    """Published methods, each with where, and this suite's own, in the order of tables; those of a user's own in neither."""
    known = [name for name in sorted(set(methods), key=method_order) if name in METHODS and not is_dense(name)]
    of = {name: method_class(name).source for name in known}
    published = [f"{name} ({source})" for name, source in of.items() if source != THIS_SUITE]
    return published, [name for name, source in of.items() if source == THIS_SUITE]
