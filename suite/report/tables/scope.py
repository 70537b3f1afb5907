"""Table of the scope's effect: how much a method seems to keep because positions stay dense."""

from __future__ import annotations

from typing import Any

from suite.report.comparisons import place
from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.quality import Average, Quality, cell_value
from suite.report.results import number
from suite.report.style import DENSE
from suite.report.tables import cells
from suite.report.task_names import task_order
from suite.report.text import MISSING, percent, signed
from suite.statistics import FloatArray

SCOPE, HIDING = "scored", "paper"  # the scope that makes every scored position sparse, and the one that does not
_COLUMNS = ["method", "mode", "sparsity", DENSE, HIDING, SCOPE, "difference", "hidden", "sparse"]


def scope_effect(material: Material) -> Content | None:
    """Averages of the same setting in both scopes, a block per model."""
    quality = material.quality
    if not quality.summary_tasks:
        return None
    shots = cells.shots_note(quality.ok)
    found = _rows_by_model(quality)
    blocks = [Block(_COLUMNS, rows, f"{model}, {dtype}") for (model, dtype), rows in found.items()]
    return Content(blocks, after=shots if blocks else _why_none(quality) + shots)


def _why_none(quality: Quality) -> str:
    scopes = sorted(set(quality.summary["scope"]) - {""})
    only = f"this run has finished settings of scope {', '.join(scopes)} only" if scopes else "no setting is finished"
    return f"Empty: {only}, and the table needs the same setting in both scopes.\n"


def _rows_by_model(quality: Quality) -> dict[tuple[str, str], list[list[str]]]:
    settings = quality.settings(quality.summary)
    by_place = {place(s.setting): s for s in settings}
    blocks: dict[tuple[str, str], list[list[str]]] = {}
    order = sorted(settings, key=lambda s: (s.setting["mode"], float(s.setting["sparsity_target"])))
    for one in (s for s in order if s.setting["scope"] == SCOPE):
        hiding = by_place.get(place({**one.setting, "scope": HIDING}))
        dense = quality.dense_of(one.setting, settings)
        if hiding is None or dense is None:
            continue
        tasks = [t for t in one.cells if all(cell_value(s.cells.get(t)) is not None for s in (one, hiding, dense))]
        if tasks:
            key = (str(one.setting["model"]), str(one.setting["dtype"]))
            blocks.setdefault(key, []).append(_row(quality, one, hiding, dense, sorted(tasks, key=task_order)))
    return blocks


def _row(quality: Quality, one: Average, hiding: Average, dense: Average, tasks: list[str]) -> list[str]:
    values = [quality.average(s, tasks) for s in (dense, hiding, one)]
    difference = quality.average_difference(hiding, one, tasks)
    shares = [number(hiding.cells[task]["sparse_share"]) for task in tasks]
    known = [share for share in shares if share is not None]
    sparse = sum(known) / len(known) if known and len(known) == len(tasks) else None
    hidden = quality.quantity([dense, hiding, one], tasks, _hidden)
    lost = quality.average_difference(dense, one, tasks)
    settled = lost is not None and lost[1] is not None and lost[1] > 0  # no share of a loss that may be none
    return [
        one.label,
        str(one.setting["mode"]),
        f"{one.setting['sparsity_target']:g}",
        *map(percent, values),
        signed(difference),
        signed(hidden, digits=0) + " %" if hidden is not None and settled else f"{MISSING} (no loss settled)",
        percent(sparse, 0) + " %",
    ]


def _hidden(means: list[FloatArray]) -> Any:
    dense, hiding, one = (sum(m[i] for m in means) for i in range(3))
    return 1 - (dense - hiding) / (dense - one)


TABLES = (
    ReportTable(
        "scope_effect",
        "Effect of the scope",
        "Scope `paper` leaves the position that predicts the first answer token dense; scope `scored` makes every scored "
        "position sparse. Average over the tasks that were run in both, percent; difference paper - scored in points, "
        "paired, with its 95 % interval; hidden: the part of the loss to dense in scope `scored` that does not show in "
        "scope `paper`; sparse: share of the scored positions that scope `paper` really makes sparse.",
        scope_effect,
    ),
)
