"""Tables as a paper prints them: rows methods, columns tasks and average, blocks per model and sparsity; Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from suite.report.comparisons import paired_table, scope_table
from suite.report.frames import (
    TEXT_METRICS,
    Average,
    Cell,
    Interval,
    Quality,
    above_chance,
    are_unequal,
    cell_value,
    columns_of,
    number,
    task_order,
    unequal,
)
from suite.report.speed import speed_rows_table, speed_table
from suite.report.text import MISSING, fixed, markdown_table, percent, signed
from suite.report.variants import calibration_table, seeds_table

UNEQUAL = "≠"
METRIC_TITLES = {
    "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
    "byte_perplexity": "byte perplexity",
    "bits_per_byte": "bits per byte",
    "kl_dense": "KL to dense",
    "top1_agreement": "top-1 agreement %",
}
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
    sparse = [one for one in settings if one.method != "dense"]
    known = [(one, v) for one in sparse if (v := value(one)) is not None]
    if len(known) < 2 or len(known) < len(sparse):
        return None
    ordered = sorted(known, key=lambda pair: -pair[1] if higher else pair[1])
    best = ordered[0][0]
    for other, _ in ordered[1:]:
        if are_unequal(best, other) and "practical" in (best.setting["mode"], other.setting["mode"]):
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
    return f"### {block['model']}, sparsity {block['sparsity_target']:g}, {block['mode']}{scope}{dtype}\n\n"


def _realized(one: Average, marked: set[str]) -> str:
    if one.method == "dense" or one.realized is None:
        return "0" if one.method == "dense" else MISSING
    return f"{one.realized:.3f}" + (f" {UNEQUAL}" if one.label in marked else "")


def _name(one: Average, block: dict[str, Any]) -> str:
    ideal_floor = one.method == "random" and one.setting["mode"] != block["mode"]
    return f"{one.label} (ideal)" if ideal_floor else one.label


def _block_notes(settings: Sequence[Average], marked: set[str]) -> str:
    notes = []
    if marked:
        parts = [f"{s.label} {s.realized:.3f}" for s in settings if s.label in marked and s.realized is not None]
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
    notes += sorted(failed)
    return "".join(f"\n{note}\n" for note in notes)


def accuracy_table(quality: Quality) -> str:
    """Summary metric of every task and the average over tasks, in percent, best in bold."""
    text = "# Accuracy\n\nPercent. " + _bold_rule()
    if any(quality.tasks_beside(block, settings) for block, settings in quality.summary_blocks):
        text += _BESIDE
    for block, settings in quality.summary_blocks:
        marked, tasks, beside = unequal(settings), quality.tasks_of(block), quality.tasks_beside(block, settings)
        best = {task: best_of(settings, *_on_task(quality, task)) for task in (*tasks, *beside)}
        best_average = best_of(settings, *_on_average(quality, tasks))
        rows = []
        for one in settings:
            value = {
                task: _bold(shown(one.cells.get(task), percent), one.label == found) for task, found in best.items()
            }
            average = _bold(percent(quality.average(one, tasks)), one.label == best_average)
            rows.append([_name(one, block), _realized(one, marked), *_columns(tasks, average, beside, value)])
        metrics = {task: f"{task} ({(quality.metric_of(task) or ('', ''))[0]})" for task in best}
        header = ["method", "realised", *_columns(tasks, "average", beside, metrics)]
        text += block_title(block) + markdown_table(header, rows) + _block_notes(settings, marked) + "\n"
    return text


_BESIDE = (
    "Columns right of the average are not in it: the matrix has those tasks in some modes and sparsities alone.\n\n"
)


def _columns(tasks: Sequence[str], average: str, beside: Sequence[str], of: Mapping[str, str]) -> list[str]:
    """Tasks of the average, the average, and the tasks beside it."""
    return [*(of[task] for task in tasks), average, *(of[task] for task in beside)]


def _bold_rule() -> str:
    return (
        "Bold: better than every other sparse row of the block, the paired 95 % interval of each difference excluding 0 "
        "(not corrected for the number of comparisons); no bold otherwise, nor while a row has no value. dense is the "
        "ceiling, random the floor. "
        f"Realised: share of neurons not used, mean over layers and tasks. {MISSING}: no value (yet).\n\n"
    )


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold and text != MISSING else text


def _on_task(quality: Quality, task: str) -> tuple[Callable[[Average], float | None], Compare]:
    def compare(one: Average, other: Average) -> Interval | None:
        return quality.difference(one.cells[task], other.cells[task])

    return lambda one: cell_value(one.cells.get(task)), compare


def _on_average(quality: Quality, tasks: Sequence[str]) -> tuple[Callable[[Average], float | None], Compare]:
    def compare(one: Average, other: Average) -> Interval | None:
        return quality.average_difference(one, other, tasks)

    return lambda one: quality.average(one, tasks), compare


def delta_table(quality: Quality) -> str:
    """Paired differences to dense with intervals, in points."""
    text = (
        "# Difference to dense\n\nPoints of the summary metric, 95 % percentile bootstrap interval over the same "
        "documents (generated items: over templates); the average resamples documents within each task. Intervals are "
        "not corrected for the number of comparisons.\n\n"
    )
    for block, settings in quality.summary_blocks:
        dense, tasks = quality.dense_of(block, settings), quality.tasks_of(block)
        beside = quality.tasks_beside(block, settings)
        rows = []
        for one in settings:
            if one.method == "dense":
                continue
            value = {}
            for task in (*tasks, *beside):
                cell = one.cells.get(task)
                value[task] = MISSING if cell is None else shown(cell, partial(_delta_text, cell))
            average = None if dense is None else quality.average_difference(one, dense, tasks)
            rows.append([_name(one, block), *_columns(tasks, signed(average), beside, value)])
        header = _columns(tasks, "average", beside, {task: task for task in (*tasks, *beside)})
        text += block_title(block) + markdown_table(["method", *header], rows) + "\n"
    return text


def _delta_text(cell: Cell, _: float) -> str:
    return signed(_stored_delta(cell))


def _stored_delta(cell: Cell) -> Interval | None:
    if (value := number(cell["delta_dense"])) is None:
        return None
    return value, number(cell["delta_ci_low"]), number(cell["delta_ci_high"])


def chance_table(quality: Quality) -> str:
    """Share of dense's above-chance accuracy that is kept, in percent."""
    text = (
        "# Share of above-chance accuracy kept\n\n(accuracy - chance) / (dense - chance), percent; for a small model "
        "chance is most of the average. Only for tasks whose dense score is more than 3 standard errors above chance; "
        "the average is over those tasks.\n\n"
    )
    reasons: dict[str, None] = {}
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
            rows.append([_name(one, block), *(percent(k, 0) for k in kept), percent(mean, 0)])
        text += block_title(block) + markdown_table(["method", *tasks, "average"], rows) + "\n"
    return text + "".join(f"{reason}\n\n" for reason in reasons)


def share_kept(one: Average, dense: Average | None, task: str) -> float | None:
    """``(accuracy - chance) / (dense - chance)`` of one cell."""
    value = cell_value(one.cells.get(task))
    reference = None if dense is None else dense.cells.get(task)
    top = cell_value(reference)
    if value is None or top is None or reference is None:
        return None
    chance = float(reference["chance"])
    return (value - chance) / (top - chance)


def text_order(column: str) -> tuple[Any, ...]:
    """Sort key of a ``task metric`` column."""
    task, _, metric = column.partition(" ")
    return (*task_order(task), TEXT_METRICS.index(metric))


def text_title(column: str) -> str:
    """Heading of a ``task metric`` column."""
    task, _, metric = column.partition(" ")
    return f"{task}, {METRIC_TITLES.get(metric, metric)}"


def perplexity_table(quality: Quality) -> str:
    """Perplexities, KL to dense and top-1 agreement; best in bold by the paired interval (log-ratio for perplexities)."""
    text = "# Perplexity, KL to dense, top-1 agreement\n\n"
    if not quality.text_blocks:
        return text + "No such rows in this run.\n"
    text += (
        "Perplexity: lower is better. KL(dense || sparse) in nats per scored token: lower is better. Top-1 agreement "
        "with dense in percent: higher is better. " + _bold_rule()
    )
    for block, settings in quality.text_blocks:
        marked = unequal(settings)
        columns = sorted(columns_of(settings), key=text_order)
        best = {c: best_of(settings, *_on_task(quality, c), c.endswith("top1_agreement")) for c in columns}
        printed = []
        for one in settings:
            cells = [
                _bold(shown(one.cells.get(c), _text_format(c.partition(" ")[2])), one.label == best[c]) for c in columns
            ]
            printed.append([_name(one, block), _realized(one, marked), *cells])
        header = ["method", "realised", *(text_title(c) for c in columns)]
        text += block_title(block) + markdown_table(header, printed) + _block_notes(settings, marked) + "\n"
    return text


def _text_format(metric: str) -> Callable[[float], str]:
    if metric == "top1_agreement":
        return percent
    return partial(fixed, digits=3) if metric in ("kl_dense", "bits_per_byte") else perplexity_text


def perplexity_text(value: float) -> str:
    """Perplexity with four significant digits or all before the point."""
    return fixed(value, 2 if value < 100 else 1 if value < 1000 else 0)


def shots_note(ok: pd.DataFrame) -> str:
    """Where the few-shot examples of each task come from; empty where a run has none, or does not say."""
    shown_rows = ok[ok["fewshot_split"] != ""]
    texts: dict[str, None] = {}
    for task, n_examples, split in shown_rows[["task", "num_fewshot", "fewshot_split"]].itertuples(index=False):
        source, scored, _ = split.partition(" (scored)")
        left_out = ", the scored split, without the document itself" if scored else ""
        texts[f"{task} {n_examples} from `{source}`{left_out}"] = None
    return f"\nFew-shot examples: {'; '.join(sorted(texts))}.\n" if texts else ""


def all_tables(quality: Quality, speed: pd.DataFrame, in_domain: Mapping[str, bool]) -> dict[str, str]:
    """Every table as Markdown by file name without suffix.

    Parameters
    ----------
    speed : DataFrame
        From :func:`with_speed_up`.
    in_domain : whether a calibration text is of the evaluated tasks' train splits
    """
    tables = {}
    if quality.summary_tasks:
        tables["accuracy"] = accuracy_table(quality)
        tables["difference_to_dense"] = delta_table(quality)
        tables["methods_against_each_other"] = paired_table(quality)
        tables["above_chance"] = chance_table(quality)
        tables["scope_effect"] = scope_table(quality)
        tables = {name: text + shots_note(quality.ok) for name, text in tables.items()}
        if seeds := seeds_table(quality):
            tables["seeds"] = seeds
        if texts := calibration_table(quality, in_domain):
            tables["calibration"] = texts
    if not quality.ok.empty:
        tables["perplexity"] = perplexity_table(quality) + shots_note(quality.ok)
    if not speed.empty:
        tables["speed"] = speed_table(speed)
        tables["speed_rows"] = speed_rows_table(speed)
    return tables
