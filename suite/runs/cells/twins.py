"""Settings that no column of their table tells apart: refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from suite.errors import InputError
from suite.schema import Table


class Setting(Protocol):
    """A cell with a row: its method's parameters, what of its row is known, and what its row is compared within."""

    @property
    def label(self) -> str:
        """As `Cell`."""

    @property
    def params(self) -> Mapping[str, Any]:
        """Fields of its method besides sparsity."""

    @property
    def base(self) -> object:
        """Rows of one base stand beside each other."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """What of its row is known before it is measured."""


def refuse_twins(cells: Iterable[Setting], table: Table) -> None:
    """Refuse settings that differ in a parameter without a column: tables, intervals and comparisons take them for one.

    Raises
    ------
    InputError
        Names a cell, and the parameters in which it differs from an earlier one.
    """
    seen: dict[tuple[object, ...], Setting] = {}
    for cell in cells:
        columns = cell.columns
        own = (cell.base, *(columns[name] for name in table.settings if name in columns))
        first = seen.setdefault(own, cell)
        if first is not cell:
            names = sorted(n for n in {*first.params, *cell.params} if first.params.get(n) != cell.params.get(n))
            raise InputError(
                f"two settings of {cell.label} differ in {', '.join(names) or 'their fits'} alone, which no column of "
                f"{table.file} shows: run them in two matrices"
            )
