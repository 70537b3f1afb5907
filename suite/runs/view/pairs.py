"""Samples of two cells of one task, paired by document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from suite.evaluation.results import WEIGHT
from suite.statistics import resampling_group

Samples = Mapping[str, Mapping[str, float]]  # value by document by metric


class Paired(NamedTuple):
    """Values and weights of two cells, each of shape (2, n_documents), the second cell's last, and what is resampled."""

    values: list[list[float]]
    weights: list[list[float]]
    groups: list[str]


def paired(own: Samples, base: Samples, metric: str, chain: str) -> Paired | None:
    """Samples of a metric, of the filter where the task has several; None unless both cells have the same documents.

    Parameters
    ----------
    own, base : samples of the two cells
    chain : name of the filter
    """
    for name in (f"{metric},{chain}", metric):
        if own.get(name) and own[name].keys() == base.get(name, {}).keys():
            documents = sorted(own[name])
            weights = [samples.get(name + WEIGHT, {}) for samples in (own, base)]
            return Paired(
                [[samples[name][d] for d in documents] for samples in (own, base)],
                [[weight.get(d, 1.0) for d in documents] for weight in weights],
                [resampling_group(d) for d in documents],
            )
    return None
