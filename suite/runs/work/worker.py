"""Does the work of cells with torch; what a cell's key covers of the source is what this module reaches for its kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suite.fitting.artifacts import Fit, PredictorFit
    from suite.modeling.loading import LoadedModel
    from suite.runs.cells.accuracy import AccuracyCell
    from suite.runs.cells.analysis import AnalysisCell
    from suite.runs.cells.base import Cell
    from suite.runs.cells.speed import TimedCell
    from suite.runs.fits import FitRequest
    from suite.runs.work.accuracy import Accuracy
    from suite.runs.work.base import Outcome


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class TorchWorker:
    """Loads models, makes fits, evaluates and times in the process that calls it.

    Parameters
    ----------
    activation_budget_gib : memory for the activations that predictors are trained on; None: half of what is free
    say : gets lines of progress of long fits
    """

    activation_budget_gib: float | None = None
    say: Callable[[str], None] = _silent

    @contextlib.contextmanager
    def session(self, cell: Cell) -> Iterator[TorchSession]:
        """Load the model of a cell's load group; its memory is given back afterwards."""
        from suite.modeling.loading import load_model

        yield TorchSession(load_model(cell.model, cell.dtype, cell.device), self)

    def time(self, cells: Sequence[TimedCell], fits: Path) -> list[dict[str, Any]]:
        """Time the cells of one group interleaved; one partial speed row a cell, in order."""
        from suite.runs.work.speed import time

        return time(cells, fits)


class TorchSession:
    """One loaded model with its evaluators and fits."""

    def __init__(self, loaded: LoadedModel, worker: TorchWorker | None = None) -> None:
        self._loaded, self._worker = loaded, worker or TorchWorker()
        self._accuracy: Accuracy | None = None
        self._fits: dict[str, Fit | PredictorFit] = {}

    def ensure_fit(
        self,
        request: FitRequest,
        key: str,
        folder: Path,
        *,
        remake: bool,
        mates: Mapping[str, FitRequest] | None = None,
    ) -> str:
        """Make the fit below ``folder`` unless it is there, with its ``mates`` in one go; returns its SHA-256."""
        from suite.fitting.artifacts import load_fit
        from suite.modeling.loading import weights_fingerprint
        from suite.runs.work.fits import make_fit

        if remake:
            self._fits.pop(key, None)
        if key not in self._fits:
            if remake or not any(folder.glob(f"{key}*")):
                make_fit(
                    self._loaded,
                    key,
                    folder,
                    {**(mates or {}), key: request},
                    activation_budget_gib=self._worker.activation_budget_gib,
                    say=self._worker.say,
                )
            fingerprint = weights_fingerprint(self._loaded.ref)
            self._fits[key] = load_fit(folder, key, model_fingerprint=fingerprint)
        return self._fits[key].sha256

    def run(self, cell: AccuracyCell, fits: Path) -> Outcome:
        """Measure one cell."""
        from suite.fitting.artifacts import load_fit
        from suite.runs.work.accuracy import Accuracy

        state = None
        if cell.fit_key is not None:
            state = self._fits.get(cell.fit_key) or load_fit(fits, cell.fit_key)
        if self._accuracy is None:
            self._accuracy = Accuracy(self._loaded)
        return self._accuracy.run(cell, state)

    def analyse(self, cell: AnalysisCell) -> Outcome:
        """Analyse the model of one cell."""
        from suite.runs.work.analysis import analyse

        return analyse(self._loaded, cell)
