"""Table of what lm-eval's groups average over their tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.results import number
from suite.report.text import MISSING, fixed, signed

_FIT = ("estimator", "predictor", "rank", "predictor_input", "exact_projection", "seed")
_COLUMNS = ["group", "model", "method", "mode", "sparsity", "fit", "metric", "tasks", "documents"]
_COLUMNS += ["value", "stderr", "chance", "minus dense"]


def groups(material: Material) -> Content | None:
    """One row a group, setting and metric."""
    frame = material.results.groups
    if frame.empty:
        return None
    return Content([Block(_COLUMNS, [_row(row) for row in frame.to_dict("records")])])


def _row(row: Mapping[Any, Any]) -> list[str]:
    setting = [str(row[name]) for name in ("group", "model", "method", "mode")]
    setting.append(MISSING if row["mode"] == "none" else f"{row['sparsity_target']:g} {row['scope']}")
    setting.append(" ".join(str(row[name]) for name in _FIT if row[name]))
    n_tasks = fixed(row["n_tasks"], 0)
    if row["status"] != "ok":
        return [*setting, f"{row['status']}: {row['reason']}", n_tasks, *[MISSING] * 5]
    metric = f"{row['metric']} ({row['filter']})" if row["filter"] not in ("", "none") else row["metric"]
    found = number(row["delta_dense"])
    ends = number(row["delta_ci_low"]), number(row["delta_ci_high"])
    delta = signed(None if found is None else (found, *ends), 1.0, 4)
    values = [fixed(row[name], 4) for name in ("value", "stderr", "chance")]
    return [*setting, metric, n_tasks, fixed(row["n_samples"], 0), *values, delta]


TABLES = (
    ReportTable(
        "groups",
        "Groups of tasks",
        "What lm-eval's groups average over their tasks, by documents or each task alike, as the group says. Differences "
        "to dense with paired 95 % intervals, documents resampled within each task.",
        groups,
        inline=False,
    ),
)
