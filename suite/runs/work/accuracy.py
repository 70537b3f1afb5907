"""Evaluates accuracy cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from suite.evaluation.evaluator import Evaluator
from suite.fitting.artifacts import Fit, PredictorFit
from suite.modeling.modes import settled
from suite.registry import get_method
from suite.runs.work.base import Outcome

if TYPE_CHECKING:
    from suite.evaluation.results import TaskResult
    from suite.modeling.attach import LayerSparsity
    from suite.modeling.loading import LoadedModel
    from suite.runs.cells.accuracy import AccuracyCell


class Accuracy:
    """The evaluators of one loaded model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._evaluators: dict[tuple[int, int], Evaluator] = {}

    def run(self, cell: AccuracyCell, state: Fit | PredictorFit | None) -> Outcome:
        """Measure one cell with its fit."""
        method = get_method(cell.method, sparsity=cell.sparsity, **cell.params)
        result, layers = self._evaluator(cell).run(
            cell.task, method, mode=cell.mode, state=state, scope=cell.scope or "scored"
        )
        predictor = _predictor_rows(state)
        shared = {name: predictor[0][name] for name in ("rank", "predictor_share")} if predictor else {}
        if isinstance(state, Fit):
            shared["predictor_share"] = state.bytes_share
        if method.factors:
            shared["exact_chosen"] = settled(method, state).exact_projection
        rows = [row | shared for row in _rows(result)]
        return Outcome(rows, [_layer(layer) for layer in layers], list(result.samples), predictor, result.choices)

    def _evaluator(self, cell: AccuracyCell) -> Evaluator:
        setting = (cell.batch_size, cell.seed)
        if setting not in self._evaluators:
            self._evaluators[setting] = Evaluator(self._loaded, batch_size=cell.batch_size, seed=cell.seed)
        return self._evaluators[setting]


def _predictor_rows(state: Fit | PredictorFit | None) -> list[dict[str, Any]]:
    """Partial rows of predictor.csv, one a layer; none for thresholds."""
    if not isinstance(state, PredictorFit):
        return []
    common = {
        "method": state.method,
        "predictor": state.predictor,
        "rank": state.rank,
        "predictor_input": state.predictor_input if state.predicted else None,
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
    realised = None if math.isnan(layer.sparsity_realized) else layer.sparsity_realized
    return {
        "layer": layer.layer,
        "site": layer.site,
        "threshold": threshold,
        "sparsity_realized": realised,
        "n_tokens": layer.n_tokens,
    }
