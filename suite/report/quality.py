"""Accuracy rows arranged: settings and their labels, blocks, task averages, differences paired by document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from suite.report.methods import dense_rows, is_dense, is_floor, method_order
from suite.report.results import BLOCK, SETTING, VARIANT, Results, number
from suite.report.samples import Samples
from suite.report.task_names import TEXT_METRICS, task_order, with_variant_names
from suite.statistics import FloatArray, Units, bootstrap_interval, paired_delta

SUMMARY_METRICS = ("acc_norm", "acc", "exact_match")
PERPLEXITIES = ("perplexity", "word_perplexity")
FILTERS = ("none", "", "strict-match")  # preferred where a task reports one metric through several filters
_PLACE = ("model", "dtype", "scope")  # settings here share their tasks
_MEANS = ("sparsity_realized", "bytes_share")
REALISED_TOLERANCE = 0.01  # practical methods further apart than this are not compared
Interval = tuple[float, float | None, float | None]
Cell = Mapping[Any, Any]  # one row of accuracy.csv
Blocks = list[tuple[dict[str, Any], list["Average"]]]


def with_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """Add ``label``: the method, and in brackets what tells settings of one method and block apart."""
    if rows.empty:
        return rows.assign(label=pd.Series(dtype=str))
    labels = rows["method"].copy()
    for _, group in rows.groupby(["model", "dtype", "scope", "mode", "method"], dropna=False):
        varying = [c for c in VARIANT if group[c].nunique() > 1]
        for index in group.index:
            values = [str(value) for value in group.loc[index, varying].tolist()]
            if any(values):
                labels[index] = f"{labels[index]} ({', '.join(v for v in values if v)})"
    return rows.assign(label=labels)


def is_aside(rows: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.Series:
    """Whether a row's fit is by another seed, or on another text, than those that the matrix names for all blocks."""
    config = manifest.get("config") or {}
    if not config.get("calibration"):  # no manifest: every row is a main one
        return pd.Series(False, index=rows.index)
    own = {config["calibration"]["source"], *(config.get("predictor") or {}).get("sources", [])}
    seeds = {str(seed) for seed in config.get("seeds") or []}
    return (rows["calibration"] != "") & ~(rows["calibration"].isin(own) & rows["seed"].isin(seeds))


@dataclass(frozen=True)
class Average:
    """One setting with its cells of the summary tasks, one per task in the order of ``tasks``."""

    setting: dict[str, Any]
    label: str
    realised: float | None
    bytes_share: float | None
    cells: dict[str, Cell]

    @property
    def method(self) -> str:
        """Registry name of the method."""
        return str(self.setting["method"])

    @property
    def is_dense(self) -> bool:
        """Whether this is the dense reference."""
        return is_dense(self.method)

    @property
    def is_floor(self) -> bool:
        """Whether this is the floor, which has no practical mode."""
        return is_floor(self.method)


class Quality:
    """Accuracy rows of one run, arranged for printing: settings in blocks, tasks in columns, paired by document.

    ``rows`` (``ok`` and ``failed``) are the main rows; ``every`` has also those of fits by other seeds and on other texts
    than the matrix' own, which stand in tables of their own.

    Parameters
    ----------
    results : Results
    """

    def __init__(self, results: Results) -> None:
        accuracy = results.accuracy
        finite = np.isfinite(accuracy["value"].to_numpy(dtype=float))
        rows = accuracy[~((accuracy["status"] == "ok") & ~finite)].reset_index(drop=True)
        rows = with_variant_names(rows, results.manifest)
        aside = is_aside(rows, results.manifest)
        self.every = rows.assign(label=rows["method"], aside=aside)
        self.rows = with_labels(rows[~aside])
        self.ok = self.rows[self.rows["status"] == "ok"]
        self.failed = self.rows[self.rows["status"] != "ok"]
        self._samples = Samples(results.samples)
        self._cache: dict[Any, Interval] = {}

    def metric_of(self, task: str) -> tuple[str, str] | None:
        """(metric, filter) that the summary uses for a task: acc_norm where defined, else acc, else exact_match."""
        rows = self.ok[self.ok["task"] == task]
        for metric in SUMMARY_METRICS:
            filters = set(rows.loc[rows["metric"] == metric, "filter"])
            for name in [*FILTERS, *sorted(filters)]:
                if name in filters:
                    return metric, name
        return None

    @cached_property
    def has_scopes(self) -> bool:
        """Whether the run has sparse settings in several scopes."""
        return len(set(self.rows["scope"]) - {""}) > 1

    @cached_property
    def summary_tasks(self) -> list[str]:
        """Tasks with a summary metric, in print order."""
        tasks = sorted(set(self.ok["task"]), key=task_order)
        return [task for task in tasks if self.metric_of(task) is not None]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per setting and task of the summary metric, failed cells included."""
        return self.summary_of(self.rows)

    def summary_of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Those of some rows."""
        keep = rows["task"].isin(self.summary_tasks) & (rows["status"] != "ok")
        for task in self.summary_tasks:
            metric, name = self.metric_of(task) or ("", "")
            keep |= (rows["task"] == task) & (rows["metric"] == metric) & (rows["filter"] == name)
        return rows[keep].drop_duplicates([*SETTING, "task"])

    @cached_property
    def summary_blocks(self) -> Blocks:
        """Blocks of the summary metrics."""
        return self.blocks(self.summary)

    @cached_property
    def text(self) -> pd.DataFrame:
        """Rows of perplexities, KL and agreement, ``task`` turned into ``task metric``; a failed cell stands for each."""
        return self.text_of(self.rows)

    def text_of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Those of some rows."""
        ok = rows[(rows["status"] == "ok") & rows["metric"].isin(TEXT_METRICS)]
        failed = rows[rows["status"] != "ok"].drop(columns="metric")
        failed = failed.merge(ok[["task", "metric"]].drop_duplicates(), on="task")
        rows = pd.concat([ok, failed[ok.columns]], ignore_index=True)
        return rows.assign(task=rows["task"] + " " + rows["metric"]).drop_duplicates([*SETTING, "task"])

    @cached_property
    def text_blocks(self) -> Blocks:
        """Blocks of :attr:`text`, cells keyed ``task metric``."""
        return self.blocks(self.text)

    @cached_property
    def perplexity_blocks(self) -> Blocks:
        """The perplexities of :attr:`text_blocks` alone."""
        return self.blocks(self.text[self.text["metric"].isin(PERPLEXITIES)])

    def tasks_of(self, block: dict[str, Any]) -> list[str]:
        """Tasks of the average: those that the matrix has in every mode and sparsity of the block's model, dtype and scope.

        A task of few blocks (generation, say) is in none of their averages, so that all are over the same tasks.
        """
        return self._averaged.get(tuple(block[column] for column in _PLACE), [])

    @cached_property
    def _averaged(self) -> dict[tuple[Any, ...], list[str]]:
        """Tasks of the average by model, dtype and scope."""
        found = {}
        for place, same in self.summary[~dense_rows(self.summary)].groupby([*_PLACE]):
            given = [set(group["task"]) for _, group in same.groupby(["mode", "sparsity_target"])]
            found[place] = sorted(set.intersection(*given) if given else (), key=task_order)
        return found

    def tasks_beside(self, block: dict[str, Any], settings: Sequence[Average]) -> list[str]:
        """Tasks of the block's sparse settings that are not in its average."""
        return sorted(columns_of(settings) - set(self.tasks_of(block)), key=task_order)

    def settings(self, rows: pd.DataFrame) -> list[Average]:
        """Settings of some rows with their cells by task (``task`` must be unique within a setting)."""
        groups: dict[tuple[Any, ...], list[Cell]] = {}
        for cell in rows.to_dict("records"):  # at once: a thousand small frames take seconds
            groups.setdefault(tuple(cell[column] for column in SETTING), []).append(cell)
        found = []
        for key, cells in groups.items():
            ok = [cell for cell in cells if cell["status"] == "ok"]
            realised, share = (pd.Series([c[name] for c in ok], dtype=float).mean() for name in _MEANS)
            found.append(
                Average(
                    setting=dict(zip(SETTING, key, strict=True)),
                    label=str(cells[0]["label"]),
                    realised=number(realised),
                    bytes_share=number(share),
                    cells={str(cell["task"]): cell for cell in cells},
                )
            )
        return sorted(found, key=lambda a: (method_order(a.method), a.label))

    def blocks(self, rows: pd.DataFrame) -> Blocks:
        """Blocks (model, dtype, scope, mode, sparsity) with dense and the floor of the same model in each.

        The floor has no practical mode: its ideal row stands in practical blocks.
        """
        settings = self.settings(rows)
        blocks: dict[tuple[Any, ...], list[Average]] = {}
        for one in settings:
            if not one.is_dense:
                blocks.setdefault(tuple(one.setting[c] for c in BLOCK), []).append(one)
        result = []
        for key in sorted(blocks, key=lambda k: (k[0], k[1], k[2], _mode_order(k[3]), k[4])):
            block = dict(zip(BLOCK, key, strict=True))
            own = blocks[key]
            same = [s for s in settings if all(s.setting[c] == block[c] for c in ("model", "dtype"))]
            dense = [s for s in same if s.is_dense][:1]
            floor: list[Average] = []
            if not any(s.is_floor for s in own):
                floor = [
                    s
                    for s in same
                    if s.is_floor
                    and s.setting["scope"] == block["scope"]
                    and s.setting["sparsity_target"] == block["sparsity_target"]
                ][:1]
            if not all(s.is_floor for s in own) or block["mode"] != "practical":
                result.append((block, sorted([*dense, *floor, *own], key=lambda a: (method_order(a.method), a.label))))
        return result

    def dense_of(self, setting: dict[str, Any], settings: Iterable[Average]) -> Average | None:
        """The dense setting of the same model and dtype."""
        for one in settings:
            if one.is_dense and all(one.setting[c] == setting[c] for c in ("model", "dtype")):
                return one
        return None

    def average(self, one: Average, tasks: Sequence[str]) -> float | None:
        """Mean of the summary metrics over all of ``tasks``; None if one is missing or failed."""
        values = [cell_value(one.cells.get(task)) for task in tasks]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known and len(known) == len(values) else None

    def units(self, cells: Sequence[Cell | None]) -> Units | None:
        """Samples of several cells of one task and metric; None unless all have the same documents."""
        found = [None if cell is None or cell["status"] != "ok" else self._samples.of(cell) for cell in cells]
        known = [one for one in found if one is not None]
        if not known or len(known) < len(found) or any(one.documents is not known[0].documents for one in known):
            return None
        values, weights = (np.stack([getattr(one, name) for one in known]) for name in ("values", "weights"))
        return Units.of(values, weights, known[0].documents.groups)

    def difference(self, one: Cell, other: Cell) -> Interval | None:
        """Paired difference of two cells of one task and metric, ``one - other``, with its 95 % interval."""
        key = (one["cell_id"], other["cell_id"], one["metric"], one["filter"])
        if key not in self._cache:
            first, second = self._samples.of(one), self._samples.of(other)
            if first is None or second is None or first.documents is not second.documents:
                return None
            self._cache[key] = paired_delta(
                first.values,
                first.weights,
                second.values,
                second.weights,
                str(one["metric"]),
                first.documents.groups,
            )
        return self._cache[key]

    def quantity(
        self, settings: Sequence[Average], tasks: Sequence[str], compute: Callable[[list[FloatArray]], Any]
    ) -> Interval | None:
        """A quantity of several settings over several tasks, documents resampled within each task.

        ``compute`` gets one array of shape (n_settings, ...) per task. None where samples are missing.
        """
        units = [self.units([one.cells.get(task) for one in settings]) for task in tasks]
        present = [u for u in units if u is not None]
        if not present or len(present) < len(tasks):
            return None
        return bootstrap_interval(present, compute)

    def average_difference(self, one: Average, other: Average, tasks: Sequence[str]) -> Interval | None:
        """Paired difference of two settings' task averages, ``one - other``."""
        key = (tuple(one.setting.values()), tuple(other.setting.values()), tuple(tasks))
        if key not in self._cache:
            found = self.quantity([one, other], tasks, lambda means: sum(m[0] - m[1] for m in means) / len(means))
            if found is None:
                return None
            self._cache[key] = found
        return self._cache[key]


def _mode_order(mode: str) -> int:
    return ["none", "ideal", "practical"].index(mode) if mode in ("none", "ideal", "practical") else 3


def cell_value(cell: Cell | None) -> float | None:
    """Value of a cell that is there and ok."""
    return None if cell is None or cell["status"] != "ok" else number(cell["value"])


def above_chance(dense: Cell | None) -> tuple[bool, str]:
    """Whether dense is more than 3 standard errors above chance on a task; else the reason."""
    value = cell_value(dense)
    if dense is None or value is None:
        return False, "dense has no value"
    chance, stderr = number(dense["chance"]), number(dense["stderr"])
    if chance is None or stderr is None:
        return False, "no chance level" if chance is None else "no standard error"
    if value - chance > 3 * stderr:
        return True, ""
    return (
        False,
        f"dense {100 * value:.1f} is not 3 standard errors ({100 * stderr:.1f}) above chance {100 * chance:.1f}",
    )


def columns_of(settings: Sequence[Average]) -> set[str]:
    """Tasks that any sparse setting has a cell of."""
    return {task for one in settings if not one.is_dense for task in one.cells}


def unequal(settings: Sequence[Average]) -> set[str]:
    """Labels of practical settings of one block that realise more than .01 away from another one of the block."""
    sparse = [s for s in settings if s.setting["mode"] == "practical" and s.realised is not None]
    return {s.label for s in sparse for o in sparse if are_unequal(s, o)}


def are_unequal(one: Average, other: Average) -> bool:
    """Whether two settings are not compared: one is practical, and they realise sparsities more than .01 apart."""
    if (
        one.realised is None
        or other.realised is None
        or "practical" not in (one.setting["mode"], other.setting["mode"])
    ):
        return False
    return abs(one.realised - other.realised) > REALISED_TOLERANCE + 1e-9
