"""What one task run with one setting yields: metric values and per-document samples."""

from __future__ import annotations

from dataclasses import dataclass, field

# Sample convention, the ground of every value, standard error and paired interval (suite.statistics):
# statistic = sum(value) / sum(weight), where the weight of a document stands in the sample row of metric
# "<metric>.weight" (1 where there is none); then exp() for *perplexity, / ln 2 for bits_per_byte.
WEIGHT = ".weight"


@dataclass(frozen=True)
class Metric:
    """One aggregated metric, named as lm-eval names it.

    ``aggregation`` names what makes the value of the documents' items, "" where the value is the statistic of samples;
    ``resampled`` are then the values of resampled documents, ``reason`` says why there are none.
    """

    name: str
    filter: str
    higher_is_better: bool
    value: float
    stderr: float | None
    chance: float | None
    aggregation: str = ""
    resampled: list[float] | None = field(default=None, repr=False)
    reason: str = ""


@dataclass(frozen=True)
class TaskResult:
    """Metrics and samples of one task under one setting.

    ``samples`` are (doc_id, metric, value), the value of a metric with an aggregation being the document's item as JSON;
    ``choices`` are (number of choices, right ones) by doc_id, of multiple choice tasks. doc_id is the index of the
    document in its split, behind ``<template>/`` for generated items, which are resampled by template. ``sparse_share``
    is the share of scored positions whose logits came from a sparse position, None where nothing was scored;
    ``fewshot_split`` the split that few-shot examples come from, None without examples.
    """

    task: str
    task_version: str
    num_fewshot: int
    n_samples: int
    sparse_share: float | None
    metrics: list[Metric]
    samples: list[tuple[str, str, float | str]] = field(repr=False)
    fewshot_split: str | None = None
    choices: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
