"""What the tables of quality share: cells as text, bold where one is best, marks and notes of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from suite.report.quality import Average, Cell, Interval, Quality, are_unequal, cell_value
from suite.report.results import number
from suite.report.text import MISSING

UNEQUAL = "≠"
BOLD_RULE = (
    "Bold: better than every other sparse row of the block, the paired 95 % interval of each difference excluding 0 "
    "(not corrected for the number of comparisons); no bold otherwise, nor while a row has no value. dense is the "
    "ceiling, random the floor. "
    f"Realised: share of neurons not used, mean over layers and tasks. {MISSING}: no value (yet)."
)
Compare = Callable[[Average, Average], Interval | None]


def shown(cell: Cell | None, text: Callable[[float], str]) -> str:
    """Text of a cell, ``failed`` or ``skipped`` where it is not ok, a dash where it is not there or not run yet."""
    if cell is None or cell["status"] == "missing":
        return MISSING
    if cell["status"] != "ok":
        return str(cell["status"])
    value = number(cell["value"])
    return MISSING if value is None else text(value)


def best_of(
    settings: Sequence[Average], value: Callable[[Average], float | None], compare: Compare, higher: bool = True
) -> str | None:
    """Label of the sparse setting that is better than every other one of the block by more than the interval.

    dense is the ceiling and takes no part. None if a row has no value (yet), if a difference's interval includes 0 or
    is not known, or if the best and another one are practical and realise sparsities more than .01 apart.
    """
    sparse = [one for one in settings if not one.is_dense]
    known = [(one, v) for one in sparse if (v := value(one)) is not None]
    if len(known) < 2 or len(known) < len(sparse):
        return None
    ordered = sorted(known, key=lambda pair: -pair[1] if higher else pair[1])
    best = ordered[0][0]
    for other, _ in ordered[1:]:
        if are_unequal(best, other):
            return None
        found = compare(best, other)
        if found is None or found[1] is None or found[2] is None:
            return None
        if not (found[1] > 0 if higher else found[2] < 0):
            return None
    return best.label


def block_title(block: dict[str, Any]) -> str:
    """Heading of a block: model, sparsity, mode, scope, dtype."""
    scope = f", scope `{block['scope']}`" if block["scope"] else ""
    dtype = f", {block['dtype']}" if block["dtype"] else ""
    return f"{block['model']}, sparsity {block['sparsity_target']:g}, {block['mode']}{scope}{dtype}"


def realised(one: Average, marked: set[str]) -> str:
    """Realised sparsity of a setting, with a mark where its label is one of ``marked``."""
    if one.is_dense or one.realised is None:
        return "0" if one.is_dense else MISSING
    return f"{one.realised:.3f}" + (f" {UNEQUAL}" if one.label in marked else "")


def name(one: Average, block: dict[str, Any]) -> str:
    """Label of a setting in a block; the floor's says that it is ideal where the block is not."""
    ideal_floor = one.is_floor and one.setting["mode"] != block["mode"]
    return f"{one.label} (ideal)" if ideal_floor else one.label


def block_notes(settings: Sequence[Average], marked: set[str]) -> list[str]:
    """What is to be said below a block: rows of unequal sparsity, and failed cells with their reason."""
    notes = []
    if marked:
        parts = [f"{s.label} {s.realised:.3f}" for s in settings if s.label in marked and s.realised is not None]
        notes.append(
            f"{UNEQUAL} unequal: realised sparsities differ by more than .01 ({', '.join(parts)}); "
            "these rows are not compared."
        )
    failed = {
        f"{s.label} on {task}: {cell['reason'] or cell['status']}"
        for s in settings
        for task, cell in s.cells.items()
        if cell["status"] not in ("ok", "missing")
    }
    return notes + sorted(failed)


def bold(text: str, is_best: bool) -> str:
    """Text of a value, bold if it is the best one."""
    return f"**{text}**" if is_best and text != MISSING else text


def on_task(quality: Quality, task: str) -> tuple[Callable[[Average], float | None], Compare]:
    """Value and comparison of settings on one task, for :func:`best_of`."""

    def compare(one: Average, other: Average) -> Interval | None:
        return quality.difference(one.cells[task], other.cells[task])

    return lambda one: cell_value(one.cells.get(task)), compare


def on_average(quality: Quality, tasks: Sequence[str]) -> tuple[Callable[[Average], float | None], Compare]:
    """Value and comparison of settings on the average of some tasks, for :func:`best_of`."""

    def compare(one: Average, other: Average) -> Interval | None:
        return quality.average_difference(one, other, tasks)

    return lambda one: quality.average(one, tasks), compare


def shots_note(ok: pd.DataFrame) -> str:
    """Where the few-shot examples of each task come from; empty where a run has none, or does not say."""
    shown_rows = ok[ok["fewshot_split"] != ""]
    texts: dict[str, None] = {}
    for task, n_examples, split in shown_rows[["task", "num_fewshot", "fewshot_split"]].itertuples(index=False):
        source, scored, _ = split.partition(" (scored)")
        left_out = ", the scored split, without the document itself" if scored else ""
        texts[f"{task} {n_examples} from `{source}`{left_out}"] = None
    return f"\nFew-shot examples: {'; '.join(sorted(texts))}.\n" if texts else ""
