"""Rows of groups.csv: what a group of lm-eval averages over the cells of its tasks, one setting at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from suite import schema
from suite.evaluation.groups import Weighting, average, average_error, averaged_metrics, shares
from suite.runs.cells.accuracy import AccuracyCell
from suite.runs.cells.groups import GroupCells
from suite.runs.view.pairs import Samples, paired
from suite.statistics import Units, bootstrap_interval, is_log_space

Row = dict[str, Any]
_OF_THE_SETTING = ("run_id", *schema.GROUPS.settings, "batch_size")


def aggregate_rows(one: GroupCells, rows: Mapping[str, Sequence[Row]], samples: Mapping[str, Samples]) -> Iterator[Row]:
    """One row a metric, or one with the reason why there is none.

    Parameters
    ----------
    rows : rows of accuracy.csv by cell id
    samples : value by document by metric, by cell id
    """
    first = rows[one.cells[0].id][0]
    common = {name: value for name, value in first.items() if name in _OF_THE_SETTING}
    common |= {"group": one.group.name, "group_version": one.group.version, "n_tasks": len(one.cells)}
    common["cell_ids"] = " ".join(cell.id for cell in one.cells)
    states = {rows[cell.id][0]["status"] for cell in one.cells}
    if states != {"ok"}:
        state = next(state for state in ("failed", "missing", "skipped") if state in states)
        n = sum(rows[cell.id][0]["status"] == state for cell in one.cells)
        yield common | {"status": state, "reason": f"{n} of {len(one.cells)} tasks"}
        return
    of_tasks = [
        {(row["metric"], row["filter"]): (cell, dense, row) for row in rows[cell.id]}
        for cell, dense in zip(one.cells, one.dense, strict=True)
    ]
    for weighting, chain, found in averaged_metrics(one.group, of_tasks):
        yield common | {"status": "ok"} | _average(weighting, chain, found, samples)


def _average(
    weighting: Weighting,
    chain: str,
    found: Sequence[tuple[AccuracyCell, AccuracyCell, Row]],
    samples: Mapping[str, Samples],
) -> Row:
    rows = [row for _, _, row in found]
    sizes = [row["n_samples"] for row in rows]
    stderr = average_error([one["stderr"] for one in rows], sizes, by_size=weighting.by_size)
    row = {
        "metric": weighting.metric,
        "filter": chain,
        "higher_is_better": rows[0]["higher_is_better"],
        "weight_by_size": weighting.by_size,
        "value": average([one["value"] for one in rows], sizes, by_size=weighting.by_size),
        "stderr": stderr,
        "chance": average([one["chance"] for one in rows], sizes, by_size=weighting.by_size),
        "n_samples": sum(sizes),
        "reason": "" if stderr is not None else "a task of the group has no standard error",
    }
    row["delta_dense"] = average([one.get("delta_dense") for one in rows], sizes, by_size=weighting.by_size)
    if row["delta_dense"] is not None:
        row |= _interval(weighting, chain, found, samples)
    return row


def _interval(
    weighting: Weighting,
    chain: str,
    found: Sequence[tuple[AccuracyCell, AccuracyCell, Row]],
    samples: Mapping[str, Samples],
) -> Row:
    """Interval of the difference to dense: documents are resampled within each task; none where values are not means."""
    if any(row.get("aggregation") for _, _, row in found):
        return {}
    pairs = [paired(samples[cell.id], samples[dense.id], weighting.metric, chain) for cell, dense, _ in found]
    tasks = [Units.of(*pair) for pair in pairs if pair is not None]
    if len(tasks) < len(found):
        return {}
    share = shares([row["n_samples"] for _, _, row in found], by_size=weighting.by_size)
    made = np.exp if is_log_space(weighting.metric) else np.asarray

    def difference(means: list[Any]) -> Any:
        return sum(part * (made(mean[0]) - made(mean[1])) for part, mean in zip(share, means, strict=True))

    _, low, high = bootstrap_interval(tasks, difference)
    return {"delta_ci_low": low, "delta_ci_high": high}
