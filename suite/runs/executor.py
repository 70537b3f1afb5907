"""Does the work of cells on this machine: the one place where runs meet torch, models, fits, evaluation and timing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import InputError
from suite.registry import get_method
from suite.runs.analysis_cells import AnalysisCell
from suite.runs.cells import AccuracyCell, FitRequest
from suite.runs.matrix import ModelCell
from suite.runs.runner import Outcome
from suite.runs.speed_cells import TimedCell

if TYPE_CHECKING:
    from suite.evaluation.evaluator import Evaluator
    from suite.evaluation.results import TaskResult
    from suite.fitting.artifacts import Fit, PredictorFit
    from suite.methods.base import Method
    from suite.modeling.attach import LayerSparsity
    from suite.modeling.loading import LoadedModel


class LocalExecutor:
    """Loads models, makes fits, evaluates and times in this process.

    Parameters
    ----------
    activation_budget_gib : memory for the activations that predictors are trained on; None: half of what is free
    say : gets lines of progress of long fits
    """

    def __init__(
        self, *, activation_budget_gib: float | None = None, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._budget, self._say = activation_budget_gib, say

    @contextlib.contextmanager
    def session(self, cell: ModelCell | TimedCell) -> Iterator[LocalSession]:
        """Load the model of a cell's load group; its memory is given back afterwards."""
        from suite.modeling.loading import load_model

        loaded = load_model(cell.model, cell.dtype, cell.device)
        yield LocalSession(loaded, activation_budget_gib=self._budget, say=self._say)

    def time(self, cells: Sequence[TimedCell], fits: Path) -> list[dict[str, Any]]:
        """Time the cells of one group interleaved; one partial speed row a cell, in order."""
        from suite.fitting.artifacts import load_fit
        from suite.speed.cases import run_group

        states = {cell.case: load_fit(fits, cell.fit_key) for cell in cells if cell.fit_key}
        cases = [cell.case for cell in cells]
        rows = run_group(cases, seed=cells[0].seed, progress=lambda label: None, states=states)
        return [dict(row) for row in rows]


class LocalSession:
    """One loaded model with its evaluators and fits.

    Parameters
    ----------
    loaded : LoadedModel
    activation_budget_gib, say : see `LocalExecutor`
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        activation_budget_gib: float | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._loaded, self._budget, self._say = loaded, activation_budget_gib, say
        self._evaluators: dict[tuple[int, int], Evaluator] = {}
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

        if remake:
            self._fits.pop(key, None)
        if key not in self._fits:
            if remake or not any(folder.glob(f"{key}*")):
                self._make(request, key, folder, {**(mates or {}), key: request})
            fingerprint = weights_fingerprint(self._loaded.ref)
            self._fits[key] = load_fit(folder, key, model_fingerprint=fingerprint)
        return self._fits[key].sha256

    def _make(self, request: FitRequest, key: str, folder: Path, together: Mapping[str, FitRequest]) -> None:
        from suite.fitting.calibration import Calibration
        from suite.fitting.predictor import Wanted, discard_partial, fit_predictors
        from suite.fitting.thresholds import fit

        calibration = Calibration(request.calibration, request.max_tokens)
        if request.options is None:
            one = fit(self._loaded, _method(request), calibration, estimator=request.estimator, seed=request.seed)
            self._save([one], key, folder)
            return
        made = fit_predictors(
            self._loaded,
            [Wanted(_method(each), each.estimator) for each in together.values()],
            calibration,
            request.options,
            seed=request.seed,
            activation_budget_gib=self._budget,
            folder=folder,
            progress=self._say,
        )
        self._save(made, key, folder)
        discard_partial(made, folder)

    @staticmethod
    def _save(made: Sequence[Fit | PredictorFit], key: str, folder: Path) -> None:
        from suite.fitting.artifacts import save_fit

        if key not in {fit.key for fit in made}:
            raise InputError(f"fit of {made[0].method} has key {made[0].key[:16]}, the run expects {key[:16]}")
        for fit in made:
            save_fit(fit, folder)

    def run(self, cell: AccuracyCell, fits: Path) -> Outcome:
        """Measure one cell."""
        from suite.fitting.artifacts import load_fit

        state = None
        if cell.fit_key is not None:
            state = self._fits.get(cell.fit_key) or load_fit(fits, cell.fit_key)
        method = get_method(cell.method, sparsity=cell.sparsity, **cell.params)
        result, layers = self._evaluator(cell).run(
            cell.task, method, mode=cell.mode, state=state, scope=cell.scope or "scored"
        )
        predictor = _predictor_rows(state)
        shared = {name: predictor[0][name] for name in ("rank", "predictor_share")} if predictor else {}
        rows = [row | shared for row in _rows(result)]
        return Outcome(rows, [_layer(layer) for layer in layers], list(result.samples), predictor, result.choices)

    def analyse(self, cell: AnalysisCell) -> Outcome:
        """Analyse the model of one cell."""
        from suite.analysis.coefficients import analyse
        from suite.data_files import read_documents

        config, field = cell.config, str(cell.task.options["field"])
        documents = read_documents(cell.task.files["test"], field)[: config.documents]
        found = analyse(
            self._loaded,
            [document[field] for document in documents],
            prompt_tokens=config.prompt_tokens,
            new_tokens=config.new_tokens,
            sparsities=config.sparsities,
        )
        return Outcome([*found.cif_caf, *found.activations])

    def _evaluator(self, cell: AccuracyCell) -> Evaluator:
        from suite.evaluation.evaluator import Evaluator

        setting = (cell.batch_size, cell.seed)
        if setting not in self._evaluators:
            self._evaluators[setting] = Evaluator(self._loaded, batch_size=cell.batch_size, seed=cell.seed)
        return self._evaluators[setting]


def _method(request: FitRequest) -> Method:
    return get_method(request.method, sparsity=request.sparsity, **request.params)


def _predictor_rows(state: Fit | PredictorFit | None) -> list[dict[str, Any]]:
    """Partial rows of predictor.csv, one a layer; none for thresholds."""
    from suite.fitting.artifacts import PredictorFit

    if not isinstance(state, PredictorFit):
        return []
    common = {
        "method": state.method,
        "predictor": state.predictor,
        "rank": state.rank,
        "sparsity_target": state.sparsity,
        "train_tokens": state.meta["n_tokens"],
        "peak_memory_mib": state.cost["peak_memory_mib"],
        "predictor_share": state.bytes_share,
    }
    return [
        {**common, "layer": layer, "fit_s": seconds, **values}
        for layer, (values, seconds) in enumerate(zip(state.meta["layers"], state.cost["layer_fit_s"], strict=True))
    ]


def _rows(result: TaskResult) -> list[dict[str, Any]]:
    return [
        {
            "task_version": result.task_version,
            "num_fewshot": result.num_fewshot,
            "fewshot_split": result.fewshot_split,
            "n_samples": result.n_samples,
            "sparse_share": result.sparse_share,
            "metric": metric.name,
            "filter": metric.filter,
            "higher_is_better": metric.higher_is_better,
            "value": metric.value,
            "stderr": metric.stderr,
            "chance": metric.chance,
            "aggregation": metric.aggregation,
            "resampled": metric.resampled,
            "reason": metric.reason,
        }
        for metric in result.metrics
    ]


def _layer(layer: LayerSparsity) -> dict[str, Any]:
    """Row of sparsity.csv; JSON has neither NaN (no token in scope) nor -inf (the threshold of sparsity 0)."""
    threshold: float | str | None = layer.threshold
    if isinstance(threshold, float) and math.isinf(threshold):
        threshold = str(threshold)
    realized = None if math.isnan(layer.sparsity_realized) else layer.sparsity_realized
    return {
        "layer": layer.layer,
        "site": layer.site,
        "threshold": threshold,
        "sparsity_realized": realized,
        "n_tokens": layer.n_tokens,
    }
