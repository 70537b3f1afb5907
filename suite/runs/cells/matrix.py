"""The cells of a run and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from suite.runs.cells.accuracy import AccuracyCell
from suite.runs.cells.analysis import AnalysisCell
from suite.runs.cells.groups import GroupCells
from suite.runs.cells.speed import TimedCell
from suite.runs.fits import FitRequest, fits_of

ModelCell = AccuracyCell | AnalysisCell  # what needs a loaded model


@dataclass(frozen=True)
class Matrix:
    """The cells of a run."""

    accuracy: Sequence[AccuracyCell]
    speed: Sequence[TimedCell]
    analysis: Sequence[AnalysisCell] = ()
    groups: Sequence[GroupCells] = ()

    @property
    def of_models(self) -> list[ModelCell]:
        """Cells that need a model, those of one model side by side."""
        cells: list[ModelCell] = [*self.accuracy, *self.analysis]
        rank = {group: number for number, group in enumerate(dict.fromkeys(cell.load_group for cell in cells))}
        return sorted(cells, key=lambda cell: rank[cell.load_group])

    @property
    def cells(self) -> list[ModelCell | TimedCell]:
        """All cells."""
        return [*self.accuracy, *self.speed, *self.analysis]

    @property
    def fitted(self) -> list[AccuracyCell | TimedCell]:
        """Cells that need a fit, of quality and of speed."""
        cells: list[AccuracyCell | TimedCell] = [*self.accuracy, *self.speed]
        return [cell for cell in cells if cell.fit_key]

    @property
    def fits(self) -> dict[str, FitRequest]:
        """Every fit that a cell needs, by its key."""
        return fits_of(self.fitted)

    @property
    def keys(self) -> list[str]:
        """Keys of all cells."""
        return [cell.key for cell in self.cells]
