"""Samples of a run by cell and metric, aligned by document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from suite.statistics import FloatArray, resampling_group


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of a cell, sorted; cells of the same documents share one object."""

    ids: tuple[str, ...]

    @cached_property
    def groups(self) -> list[str]:
        """What is resampled together, a name a document."""
        return [resampling_group(name) for name in self.ids]


@dataclass(frozen=True, eq=False)
class CellSamples:
    """Samples of one cell and metric: values and weights of shape (n_documents,)."""

    documents: Documents
    values: FloatArray
    weights: FloatArray


class Samples:
    """Samples of a run.

    Parameters
    ----------
    frame : DataFrame
        Rows of samples.csv.gz.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self._found: dict[tuple[str, str], CellSamples | None] = {}

    def of(self, cell: Mapping[Any, Any]) -> CellSamples | None:
        """Samples of a row of accuracy.csv; None where there are none, or two of one document."""
        for name in (f"{cell['metric']},{cell['filter']}", str(cell["metric"])):
            key = (str(cell["cell_id"]), name)
            if key not in self._found:
                self._found[key] = self._weighted(*key)
            if (found := self._found[key]) is not None:
                return found
        return None

    def _weighted(self, cell: str, name: str) -> CellSamples | None:
        own, weights = self._sorted.get((cell, name)), self._sorted.get((cell, f"{name}.weight"))
        if own is None:
            return None
        documents, values = own
        if weights is None:
            return CellSamples(documents, values, np.ones(len(values)))
        if weights[0] is documents:
            return CellSamples(documents, values, weights[1])
        weight = dict(zip(weights[0].ids, weights[1].tolist(), strict=True))
        return CellSamples(documents, values, np.array([weight.get(name, np.nan) for name in documents.ids]))

    @cached_property
    def _sorted(self) -> dict[tuple[str, str], tuple[Documents, FloatArray]]:
        """Documents and values by (cell, metric), without those that have a document twice.

        Two filters under one name cannot be told apart: no interval then.
        """
        rows = self._frame[self._frame["value"].notna()]  # the others are items of an aggregation
        names, values = rows["doc_id"].to_numpy(dtype=object), rows["value"].to_numpy(dtype=float)
        groups: dict[Any, Any] = rows.groupby(["cell_id", "metric"], sort=False).indices
        orders: dict[tuple[str, ...], tuple[Documents, list[int]] | None] = {}
        shared: dict[tuple[str, ...], Documents] = {}
        found = {}
        for (cell, metric), places in groups.items():
            ids = tuple(map(str, names[places]))
            if ids not in orders:
                order = sorted(range(len(ids)), key=ids.__getitem__)
                in_order = tuple(ids[i] for i in order)
                is_unique = len(set(ids)) == len(ids)
                orders[ids] = (shared.setdefault(in_order, Documents(in_order)), order) if is_unique else None
            if (known := orders[ids]) is not None:
                found[str(cell), str(metric)] = (known[0], values[places][known[1]])
        return found
