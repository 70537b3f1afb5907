"""What a worker offers, and what the work on a cell yields."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from suite.runs.cells.accuracy import AccuracyCell
    from suite.runs.cells.analysis import AnalysisCell
    from suite.runs.cells.base import Cell
    from suite.runs.cells.speed import TimedCell
    from suite.runs.fits import FitRequest


@dataclass(frozen=True)
class Outcome:
    """What one accuracy cell yields: partial CSV rows, one per metric; sparsity per layer; samples per document.

    ``choices`` are the number of choices and of right ones by document of a multiple choice task.
    ``predictor`` describes the predictor that was used: partial rows of predictor.csv, one per layer.
    """

    rows: list[dict[str, Any]]
    sparsity: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[str, str, float | str]] = field(default_factory=list)
    predictor: list[dict[str, Any]] = field(default_factory=list)
    choices: dict[str, tuple[int, int]] = field(default_factory=dict)


class Session(Protocol):
    """One loaded model."""

    def ensure_fit(
        self, request: FitRequest, key: str, folder: Path, *, remake: bool, mates: Mapping[str, FitRequest]
    ) -> str:
        """Make the fit below ``folder`` unless it is there, with its ``mates`` in one go; returns its SHA-256."""

    def run(self, cell: AccuracyCell, fits: Path) -> Outcome:
        """Measure one cell."""

    def analyse(self, cell: AnalysisCell) -> Outcome:
        """Analyse the model of one cell; its rows are those of cif_caf.csv and activations.csv."""


class Worker(Protocol):
    """Does the work of cells; the runs' own is ``suite.runs.work.worker.TorchWorker``. It can be pickled."""

    def session(self, cell: Cell) -> contextlib.AbstractContextManager[Session]:
        """Load the model of a cell's load group."""

    def time(self, cells: Sequence[TimedCell], fits: Path) -> list[dict[str, Any]]:
        """Time the cells of one group interleaved, with their fits; one partial speed row a cell, in order."""
