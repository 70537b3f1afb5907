"""Metrics of lm-eval's tasks: sums over documents as samples, all others through the task's own aggregation.

A metric is a sum of samples where its aggregation is a mean, a perplexity or bits per byte and its name says so, which is
how `suite.statistics` reads samples. Every other one (F1, Matthews' correlation, BLEU, a task's own function ...) has an
item for each document, whatever the aggregation takes, and its value, standard error and intervals come from the
aggregation of all, or of resampled, documents' items.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api import metrics as lm_eval_metrics
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import Task

from suite.errors import CellError
from suite.statistics import is_log_space, resample_items, resampling_group

Sample = tuple[str, float, float | None]  # document, value, weight (None: 1)
Aggregation = Callable[[list[Any]], Any]
# How many there are follows from the aggregation alone, so that a slow machine's row has what a fast one's has.
N_RESAMPLES = 1000  # lm-eval's own aggregations and tasks' functions
N_RESAMPLES_OF_TEXTS = 100  # as lm-eval takes: .3 s each for a thousand documents
LONGEST_S = 600.0  # a protection, not a budget: one metric of one cell
_TEXTS = ("bleu", "chrf", "chrf++", "ter")
_LOG_SPACE = (lm_eval_metrics.perplexity, lm_eval_metrics.weighted_perplexity)
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Aggregated:
    """A metric's value with what resampled documents give; ``reason`` says why nothing was resampled."""

    value: float
    resampled: list[float] | None
    reason: str

    @property
    def stderr(self) -> float | None:
        """Spread of the resampled values."""
        return None if self.resampled is None else float(np.std(self.resampled, ddof=1))


@dataclass(frozen=True)
class Items:
    """What a metric's aggregation takes of each document.

    Parameters
    ----------
    metric, task : str
        Names, for messages.
    documents : sequence of n str
        Label of each document.
    items : sequence of n objects
    aggregate : callable
        Makes the metric's value of a list of items.
    """

    metric: str
    task: str
    documents: Sequence[str]
    items: Sequence[Any]
    aggregate: Aggregation

    @property
    def aggregation(self) -> str:
        """Name of the aggregation: lm-eval's, or ``!function <name>`` for a task's own."""
        return aggregation_name(self.aggregate)

    def measure(self) -> Aggregated:
        """Value of all documents, and of resampled ones.

        Raises
        ------
        CellError
            The aggregation fails on the items, or what it gives is not a finite number.
        """
        with warnings.catch_warnings():  # of classes that no document, or no resampled one, is predicted to be in
            warnings.simplefilter("ignore")
            try:
                value = float(self.aggregate(list(self.items)))
            except FAILURES as error:
                raise CellError(f"metric {self.metric} of task {self.task}: {self._failure(error)}") from error
            if not np.isfinite(value):
                raise CellError(f"metric {self.metric} of task {self.task} is {value}: no number is stored for it")
            return Aggregated(value, *self._resampled())

    def _resampled(self) -> tuple[list[float] | None, str]:
        groups = [resampling_group(document) for document in self.documents]
        n_resamples = N_RESAMPLES_OF_TEXTS if self.aggregation in _TEXTS else N_RESAMPLES
        if len(set(groups)) < 2:
            return None, ""
        if self.aggregate is lm_eval_metrics.bypass_agg:
            return None, f"no interval for {self.metric}: bypass looks at no document"
        try:
            found = resample_items(self.items, groups, self.aggregate, n_resamples=n_resamples, longest_s=LONGEST_S)
        except FAILURES as error:
            return None, f"no interval for {self.metric}: of resampled documents, {self._failure(error)}"
        if found is None:
            limit = f"stopped at the hard limit of {LONGEST_S:.0f} s, before all {n_resamples} resamples were made"
            return None, f"no interval for {self.metric}: {limit}"
        if not np.isfinite(found).all():
            return None, f"no interval for {self.metric}: {self.aggregation} of resampled documents is not finite"
        return found.tolist(), ""

    def _failure(self, error: Exception) -> str:
        said = next(iter(str(error).splitlines()), "")
        return f"its aggregation {self.aggregation} fails: {type(error).__name__} {said}".rstrip()

    def samples(self) -> list[tuple[str, str]]:
        """(document, item as JSON)."""
        return [(label, _json(item)) for label, item in zip(self.documents, self.items, strict=True)]


def collect(
    task: Task, raw: Mapping[tuple[str, str], Sequence[tuple[str, Any]]]
) -> dict[tuple[str, str], list[Sample] | Items]:
    """Per (metric, filter) samples, or items where the value is not a sum over documents.

    Parameters
    ----------
    raw : what the task's ``process_results`` gave, (document, object) per (metric, filter)
    """
    aggregations = task.aggregation()
    found: dict[tuple[str, str], list[Sample] | Items] = {}
    for (metric, filter_name), rows in raw.items():
        aggregate = aggregations.get(metric) or lm_eval_metrics.mean  # what lm-eval takes where a task names none
        samples = _as_samples(metric, aggregate, rows)
        found[metric, filter_name] = samples or Items(
            metric, task.task_name, [label for label, _ in rows], [item for _, item in rows], aggregate
        )
    return found


def _as_samples(metric: str, aggregate: Aggregation, rows: Sequence[tuple[str, Any]]) -> list[Sample] | None:
    """Rows in the sample convention, negative log-likelihoods for what is in log space; None: it does not hold them."""
    if aggregate is lm_eval_metrics.mean:
        if is_log_space(metric) or metric == "bits_per_byte":
            return None
        try:
            return [(label, float(value), None) for label, value in rows]
        except (TypeError, ValueError):
            return None
    if aggregate in _LOG_SPACE and is_log_space(metric):
        weighted = aggregate is lm_eval_metrics.weighted_perplexity
    elif aggregate is lm_eval_metrics.bits_per_byte and metric == "bits_per_byte":
        weighted = True
    else:
        return None
    if weighted:
        return [(label, -float(value[0]), float(value[1])) for label, value in rows]
    return [(label, -float(value), None) for label, value in rows]


def aggregation_name(aggregate: Aggregation) -> str:
    """lm-eval's name of an aggregation, else ``!function <name>``."""
    for name, known in AGGREGATION_REGISTRY.items():
        if known is aggregate:
            return str(name)
    return f"!function {getattr(aggregate, '__name__', type(aggregate).__name__)}"


def aggregate_items(aggregation: str, items: Sequence[str]) -> float | None:
    """Value that one of lm-eval's aggregations gives of items as JSON; None for a task's own function.

    Parameters
    ----------
    aggregation : name, as in the column ``aggregation``
    items : JSON of each document
    """
    aggregate = dict(AGGREGATION_REGISTRY.items()).get(aggregation)
    if aggregate is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(aggregate([json.loads(item) for item in items]))


def _json(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    """Arrays and their numbers as lists and numbers, sets as sorted lists, anything else as its text."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else repr(value)
