"""What one task run with one setting yields: metric values and per-document samples."""

from __future__ import annotations

from dataclasses import dataclass, field

# Sample convention, the ground of every value, standard error and paired interval (suite.statistics):
# statistic = sum(value) / sum(weight), where the weight of a document stands in the sample row of metric
# "<metric>.weight" (1 where there is none); then exp() for *perplexity, / ln 2 for bits_per_byte.
WEIGHT = ".weight"


@dataclass(frozen=True)
class Metric:
    """One aggregated metric, named as lm-eval names it."""

    name: str
    filter: str
    higher_is_better: bool
    value: float
    stderr: float | None
    chance: float | None


@dataclass(frozen=True)
class TaskResult:
    """Metrics and samples of one task under one setting.

    ``samples`` are (doc_id, metric, value); doc_id is the index of the document in its split, behind
    ``<template>/`` for generated items, which are resampled by template. ``sparse_share`` is the share of scored
    positions whose logits came from a sparse position, None where nothing was scored; ``fewshot_split`` the split that
    few-shot examples come from, None without examples.
    """

    task: str
    task_version: str
    num_fewshot: int
    n_samples: int
    sparse_share: float | None
    metrics: list[Metric]
    samples: list[tuple[str, str, float]] = field(repr=False)
    fewshot_split: str | None = None
