"""Table of what is kept of the accuracy above chance."""

from __future__ import annotations

from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.quality import Average, above_chance, cell_value
from suite.report.tables import cells
from suite.report.text import percent


def shares_kept(material: Material) -> Content | None:
    """Share of dense's above-chance accuracy that is kept, in percent."""
    quality = material.quality
    if not quality.summary_tasks:
        return None
    reasons: dict[str, None] = {}
    blocks = []
    for block, settings in quality.summary_blocks:
        dense, tasks = quality.dense_of(block, settings), quality.tasks_of(block)
        eligible = []
        for task in tasks:
            fine, reason = above_chance(None if dense is None else dense.cells.get(task))
            if fine:
                eligible.append(task)
            else:
                reasons[f"{block['model']}, {task}: empty, {reason}."] = None
        rows = []
        for one in settings:
            kept = [share_kept(one, dense, task) if task in eligible else None for task in tasks]
            known = [k for k in kept if k is not None]
            mean = sum(known) / len(known) if known and len(known) == len(eligible) else None
            rows.append([cells.name(one, block), *(percent(k, 0) for k in kept), percent(mean, 0)])
        blocks.append(Block(["method", *tasks, "average"], rows, cells.block_title(block)))
    return Content(blocks, after="".join(f"{reason}\n\n" for reason in reasons) + cells.shots_note(quality.ok))


def share_kept(one: Average, dense: Average | None, task: str) -> float | None:
    """``(accuracy - chance) / (dense - chance)`` of one cell."""
    value = cell_value(one.cells.get(task))
    reference = None if dense is None else dense.cells.get(task)
    top = cell_value(reference)
    if value is None or top is None or reference is None:
        return None
    chance = float(reference["chance"])
    return (value - chance) / (top - chance)


TABLES = (
    ReportTable(
        "above_chance",
        "Share of above-chance accuracy kept",
        "(accuracy - chance) / (dense - chance), percent; for a small model chance is most of the average. Only for tasks "
        "whose dense score is more than 3 standard errors above chance; the average is over those tasks.",
        shares_kept,
    ),
)
