"""Statistics of samples: a metric's value, its standard error, and paired bootstrap intervals; numpy only.

Convention: a document carries a value and a weight, and the statistic is ``sum(value) / sum(weight)``, then ``exp`` for
metrics named ``*perplexity`` (value: negative log-likelihood, weight: tokens, words or bytes), ``/ ln 2`` for
``bits_per_byte``, unchanged otherwise (weight 1). Documents made from one template are not independent draws: they are
summed first, and the template is what is resampled.

Intervals are 95 % percentile bootstrap intervals, every system on the same resampled documents, each task's documents
resampled within the task. Percentile rather than BCa because methods often agree with dense on every document, where BCa
is undefined, because its jackknife costs n^2, and because a percentile interval of a log-ratio carries over to the
perplexity unchanged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from suite.errors import InputError

FloatArray = NDArray[np.float64]

CONFIDENCE = 0.95
N_RESAMPLES = 2000
METHOD_NAME = f"{CONFIDENCE:.0%} percentile bootstrap over documents, paired, {N_RESAMPLES} resamples"
_BATCH_ELEMENTS = 2_000_000  # counted at once: 16 MB per array, whatever the number of documents
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


def resampling_group(doc_id: str) -> str:
    """Return the unit that is resampled: the template of ``"<template>/<index>"``, else the document itself."""
    template, slash, _ = doc_id.rpartition("/")
    return template if slash else doc_id


def is_log_space(metric: str) -> bool:
    """Whether a metric is the exponential of its mean sample and is therefore compared as a ratio."""
    return metric.endswith("perplexity")


def transform(mean: float, metric: str) -> float:
    """Mean sample to the metric's value."""
    if is_log_space(metric):
        return float(np.exp(mean))
    return float(mean / np.log(2)) if metric == "bits_per_byte" else float(mean)


@dataclass(frozen=True, eq=False)
class Units:
    """Samples of several systems on the same documents of one task, summed over each resampling unit.

    Parameters
    ----------
    values, weights : ndarray, shape (n_systems, n_units), float64
    """

    values: FloatArray
    weights: FloatArray

    @classmethod
    def of(cls, values: ArrayLike, weights: ArrayLike | None = None, groups: Sequence[object] | None = None) -> Units:
        """Check samples of one or several systems and sum them over their groups.

        Parameters
        ----------
        values, weights : array_like, shape (n_documents,) or (n_systems, n_documents)
            ``weights=None`` stands for 1.
        groups : sequence of n_documents hashables, optional
            Resampling unit of each document; None: each document is its own.

        Raises
        ------
        InputError
            Shapes that do not match, no document, a value that is not finite, or no weight at all.
        """
        value = np.atleast_2d(np.asarray(values, dtype=np.float64))
        weight = np.ones_like(value) if weights is None else np.atleast_2d(np.asarray(weights, dtype=np.float64))
        if value.shape != weight.shape or value.ndim != 2:
            raise InputError(f"samples: values {value.shape} and weights {weight.shape} are not of the same documents")
        if value.shape[1] == 0:
            raise InputError("samples: no document; a statistic needs at least one")
        if not (np.isfinite(value).all() and np.isfinite(weight).all()):
            raise InputError("samples: a value is not finite (NaN or inf); the cell it comes from has failed")
        if (weight < 0).any() or (weight.sum(axis=1) <= 0).any():
            raise InputError("samples: weights must be >= 0 with a positive sum")
        if groups is not None:
            if len(groups) != value.shape[1]:
                raise InputError(f"samples: {len(groups)} groups for {value.shape[1]} documents")
            code = {group: i for i, group in enumerate(dict.fromkeys(groups))}
            member = np.fromiter((code[group] for group in groups), dtype=np.intp, count=len(groups))
            value, weight = _sum_by(value, member, len(code)), _sum_by(weight, member, len(code))
        return cls(value, weight)

    @property
    def n_units(self) -> int:
        """Number of resampling units."""
        return int(self.values.shape[1])

    def means(self) -> FloatArray:
        """``sum(value) / sum(weight)`` per system, shape (n_systems,)."""
        return np.asarray(self.values.sum(axis=-1) / self.weights.sum(axis=-1))

    def resampled_means(self, n_resamples: int, seed: int, stream: int) -> FloatArray:
        """The same of resampled units, shape (n_systems, n_resamples); every system has the same units.

        Draws are counts of each unit, shared by all that have the same number of units, seed and stream, so that a
        resample is one product of a matrix with a vector: 10 ms for 2000 resamples of 2000 units, where
        ``scipy.stats.bootstrap``, which gathers, takes 90. One system at a time: equal systems give equal sums.
        """
        rows = max(1, _BATCH_ELEMENTS // self.n_units)
        parts: list[FloatArray] = []
        for start in range(0, n_resamples, rows):
            counts = _counts(self.n_units, min(rows, n_resamples - start), (seed, stream, start)).astype(np.float64)
            totals: list[FloatArray] = []
            for row, weight in enumerate(self.weights):
                same = next((i for i in range(row) if np.array_equal(self.weights[i], weight)), None)
                totals.append(counts @ weight if same is None else totals[same])
            parts.append(np.stack([counts @ values / total for values, total in zip(self.values, totals, strict=True)]))
        return np.concatenate(parts, axis=-1)


@lru_cache(maxsize=64)  # 2 MB each
def _counts(n_units: int, rows: int, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """How often each unit is drawn in each of some resamples, shape (rows, n_units); never near 255 times."""
    drawn = np.random.default_rng(seed).integers(0, n_units, (rows, n_units))
    flat = (drawn + np.arange(rows)[:, None] * n_units).ravel()
    return np.minimum(np.bincount(flat, minlength=rows * n_units), 255).astype(np.uint8).reshape(rows, n_units)


def _sum_by(array: FloatArray, member: NDArray[np.intp], n_groups: int) -> FloatArray:
    return np.stack([np.bincount(member, weights=row, minlength=n_groups) for row in array])


def resample_items(
    items: Sequence[Any],
    groups: Sequence[object],
    aggregate: Callable[[list[Any]], Any],
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    longest_s: float = math.inf,
) -> FloatArray | None:
    """Values that an aggregation gives of resampled documents, for metrics that are not sums over documents.

    Draws are those of :meth:`Units.resampled_means`, so that two systems' values of one resample are of the same
    documents and may be subtracted.

    Parameters
    ----------
    items : sequence of n_documents objects
        What ``aggregate`` takes of each document.
    groups : sequence of n_documents hashables
        Resampling unit of each document.
    longest_s : float
        Seconds after which to give up.

    Returns
    -------
    ndarray, shape (n_resamples,); None if it takes longer than ``longest_s``.
    """
    members: dict[object, list[int]] = {}
    for document, group in enumerate(groups):
        members.setdefault(group, []).append(document)
    units = list(members.values())
    rows = max(1, _BATCH_ELEMENTS // len(units))
    values: list[float] = []
    begin = time.monotonic()
    for start in range(0, n_resamples, rows):
        for counts in _counts(len(units), min(rows, n_resamples - start), (seed, 0, start)):
            drawn = (items[i] for unit, count in zip(units, counts, strict=True) for _ in range(count) for i in unit)
            values.append(float(aggregate(list(drawn))))
            if time.monotonic() - begin > longest_s:
                return None
    return np.asarray(values)


def statistic(values: ArrayLike, weights: ArrayLike | None, metric: str) -> float:
    """Value of a metric from one system's samples, shape (n_documents,)."""
    return transform(float(Units.of(values, weights).means()[0]), metric)


def standard_error(
    values: ArrayLike, weights: ArrayLike | None, metric: str, groups: Sequence[object] | None = None
) -> float | None:
    """Estimate the standard error of :func:`statistic` (linearised ratio over resampling units); None below two units.

    With weights 1 and no groups it is the sample standard deviation over sqrt(n); for perplexities the delta method
    applies, ``value * stderr(log value)``.
    """
    units = Units.of(values, weights, groups)
    if units.n_units < 2:
        return None
    mean = float(units.means()[0])
    residual = units.values[0] - mean * units.weights[0]
    n = units.n_units
    error = float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / units.weights[0].sum())
    if is_log_space(metric):
        return float(np.exp(mean)) * error
    return transform(error, metric)


def bootstrap_interval(
    tasks: Sequence[Units],
    quantity: Callable[[list[FloatArray]], Any],
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float | None, float | None]:
    """Value and 95 % interval of a quantity of several systems on one or several tasks.

    Parameters
    ----------
    tasks : sequence of Units
        Every task with the same systems in the same order; each task's units are resampled within the task.
    quantity : callable
        Maps the means of the tasks, a list of arrays of shape (n_systems, ...), to an array of shape (...).

    Returns
    -------
    tuple of (value, low, high)
        low and high are None where a task has fewer than two units, or where the quantity is not finite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # a ratio to a system that gets nothing right
        value = float(quantity([task.means() for task in tasks]))
    if not np.isfinite(value) or any(task.n_units < 2 for task in tasks):
        return value, None, None

    with np.errstate(divide="ignore", invalid="ignore"):
        means = [task.resampled_means(n_resamples, seed, stream) for stream, task in enumerate(tasks)]
        low, high = (float(end) for end in np.quantile(quantity(means), _TAILS))
    return (value, low, high) if np.isfinite(low) and np.isfinite(high) else (value, None, None)


def paired_delta(
    values: ArrayLike,
    weights: ArrayLike | None,
    base_values: ArrayLike,
    base_weights: ArrayLike | None,
    metric: str,
    groups: Sequence[object] | None = None,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float | None, float | None]:
    """Difference of a metric between a system and a base (dense) on the same documents, with its 95 % interval.

    Perplexities are resampled as log-ratios, and the ends converted to differences to the base's perplexity.

    Parameters
    ----------
    values, base_values : array_like, shape (n_documents,)
        In the same order of documents.
    weights, base_weights : array_like of the same shape, or None for 1
    metric : str
        Metric name without filter.
    groups : sequence of n_documents hashables, optional
        ``[resampling_group(d) for d in doc_ids]``.

    Returns
    -------
    tuple of (delta, low, high)
        low and high are None with fewer than two resampling units.
    """
    own, base = (np.asarray(v, dtype=np.float64) for v in (values, base_values))
    if own.shape != base.shape or own.ndim != 1:
        raise InputError(f"samples: {own.shape} and {base.shape} are not of the same documents; pair them by doc_id")
    one = np.ones_like(own)
    pair = Units.of(
        np.stack([own, base]),
        np.stack([one if w is None else np.asarray(w, dtype=np.float64) for w in (weights, base_weights)]),
        groups,
    )

    def difference(means: list[FloatArray]) -> FloatArray:
        return np.asarray(means[0][0] - means[0][1])

    ends = bootstrap_interval([pair], difference, n_resamples=n_resamples, seed=seed)
    if is_log_space(metric):
        reference = transform(float(pair.means()[1]), metric)
        delta, low, high = (None if end is None else reference * float(np.expm1(end)) for end in ends)
    else:
        delta, low, high = (None if end is None else transform(end, metric) for end in ends)
    return (float("nan") if delta is None else delta), low, high


def paired_delta_of_resampled(
    value: float, resampled: Sequence[float] | None, base_value: float, base_resampled: Sequence[float] | None
) -> tuple[float, float | None, float | None]:
    """Difference of two systems' values of one metric, with its 95 % interval from values of the same resamples.

    Parameters
    ----------
    resampled, base_resampled : sequence of n_resamples floats, or None
        From :func:`resample_items` with the same documents, number and seed.
    """
    delta = value - base_value
    if resampled is None or base_resampled is None or len(resampled) != len(base_resampled):
        return delta, None, None
    low, high = (float(end) for end in np.quantile(np.asarray(resampled) - np.asarray(base_resampled), _TAILS))
    return delta, low, high
