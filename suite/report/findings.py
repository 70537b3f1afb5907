"""What a run found, in plain sentences made from its numbers; unfavourable findings as prominently as favourable ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from suite.evaluation.tasks import DECODE_PERPLEXITY
from suite.report.claims import BASELINES, C1_METHOD, C2_METHOD, COUNTDOWN, INDIRECT, PAIRS
from suite.report.comparisons import corrected, pair_rows, settled
from suite.report.material import Material
from suite.report.methods import dense_rows
from suite.report.quality import Average, Interval, Quality, are_unequal, cell_value
from suite.report.results import CHOICE, Results
from suite.report.speed import PROBES, panel_title, panels, speed_label
from suite.report.task_names import text_title
from suite.report.text import markdown_table, percent, perplexity_text, shortened, signed

ANALYSED = 0.8  # sparsity of the one sentence about kept sets


@dataclass(frozen=True)
class Duel:
    """One method against another on one task at one sparsity; ``gain`` > 0 means that the first is better."""

    task: str
    where: str
    gain: float
    settled: bool
    text: str


def summary(material: Material) -> str:
    """Bullet points of the report's first section."""
    quality = material.quality
    lines = [
        *_duel_lines(quality),
        *_paired_lines(quality),
        *_analysis_lines(material.results),
        *_quality_lines(quality),
        *_perplexity_lines(quality),
        *_realised_lines(quality),
    ]
    lines += _speed_lines(material.speed)
    return "".join(f"* {line}\n" for line in lines) or "* No finished cell yet.\n"


def _duel_lines(quality: Quality) -> list[str]:
    """M-COUNTDOWN against the baselines, what it loses named beside what it wins."""
    lines = []
    for other in BASELINES:
        found = _duels(quality, C2_METHOD, other)
        won, lost = ([d for d in found if d.settled and (d.gain > 0) is better] for better in (True, False))
        if found:
            n_open = len(found) - len(won) - len(lost)
            by_task = Counter(d.task for d in lost).most_common()
            where = f" ({shortened([f'{n} on {task}' for task, n in by_task], 8)})" if lost else ""
            lines.append(
                f"{C2_METHOD} is better than {other} in {len(won)} of {len(found)} comparisons (task x mode x "
                f"sparsity), worse in {len(lost)}{where}, and {n_open} are not settled by these documents."
            )
    return lines


def _paired_lines(quality: Quality) -> list[str]:
    lines = paired_lines(quality)
    return [_nested("The same with averages, corrected for the number of comparisons (Holm):", lines)] if lines else []


def paired_lines(quality: Quality) -> list[str]:
    """One sentence per pair and family for the report's summary."""
    lines = []
    for first, second in PAIRS:
        for (model, _, scope), rows in pair_rows(quality, first, second).items():
            adjusted = corrected(rows)
            won, lost = settled(rows, adjusted)
            if adjusted:
                lines.append(
                    f"  * {first} against {second}, {model}, scope {scope}: better in {won}, worse in {lost}, not settled "
                    f"in {len(adjusted) - won - lost} of {len(adjusted)}."
                )
    return lines


def _analysis_lines(results: Results) -> list[str]:
    """What the analysis of generated tokens says about the two methods that need no predictor."""
    lines = []
    ours, other = INDIRECT
    sets, layers = results.cif_caf, results.activations
    for model in dict.fromkeys(sets["model"]):
        own = sets[(sets["model"] == model) & (sets["sparsity"] == ANALYSED)].set_index("row_method")["cif_alive"]
        mass = layers[layers["model"] == model].pivot_table(index="layer", columns="quantity", values="mass_kept_at_80")
        if {*INDIRECT} <= set(own.index) and {"abs_up", "abs_act", "abs_product"} <= set(mass.columns):
            wins = int((mass["abs_up"] > mass["abs_act"]).sum())
            means = [percent(float(mass[c].mean()), 0) for c in ("abs_product", "abs_up", "abs_act")]
            lines.append(
                f"{model}, generated tokens, sparsity {ANALYSED:g}: of the neurons that {C1_METHOD} keeps, {ours} misses "
                f"{percent(float(own[other]), 0)} % and {other} {percent(float(own[ours]), 0)} %; of the sum of v^2 they "
                f"keep {means[0]}, {means[1]} and {means[2]} % (mean over layers), {ours} more than {other} in {wins} of "
                f"{len(mass)} layers."
            )
    return lines


def _where(block: dict[str, Any]) -> str:
    scope = f", scope {block['scope']}" if block["scope"] else ""
    return f"{block['model']}, {block['mode']}, sparsity {block['sparsity_target']:g}{scope}"


def _quality_lines(quality: Quality) -> list[str]:
    lines = []
    for block, settings in quality.summary_blocks:
        tasks, dense = quality.tasks_of(block), quality.dense_of(block, settings)
        top = None if dense is None else quality.average(dense, tasks)
        found = [(quality.average(one, tasks), one) for one in settings if not one.is_dense]
        known = sorted(((v, one) for v, one in found if v is not None), key=lambda pair: -pair[0])
        if dense is None or top is None or not known:
            lines.append(
                f"  * {_where(block)}: no average over the {len(tasks)} task(s) yet, cells are missing or failed."
            )
            continue
        parts = []
        for value, one in known:
            loss = quality.quantity([one, dense], tasks, _relative_change)
            parts.append(f"{one.label} {percent(value)} ({signed(loss, digits=0)})")
        lines.append(f"  * {_where(block)}: dense {percent(top)}, {', '.join(parts)}.")
    head = (
        "Averages over tasks, best first; in brackets the change relative to dense in percent with its 95 % interval:"
    )
    return [_nested(head, lines)] if lines else []


def _nested(head: str, lines: list[str]) -> str:
    return "\n".join([head, *lines])


def _relative_change(means: list[Any]) -> Any:
    return sum(m[0] for m in means) / sum(m[1] for m in means) - 1


def _perplexity_lines(quality: Quality) -> list[str]:
    by_task: dict[str, list[str]] = {}
    for block, settings in quality.perplexity_blocks:
        for task in sorted({task for one in settings for task in one.cells}):
            values = [(cell_value(one.cells.get(task)), one) for one in settings]
            known = sorted(((v, one) for v, one in values if v is not None), key=lambda pair: pair[0])
            if len(known) > 1:
                order = ", ".join(f"{one.label} {perplexity_text(v)}" for v, one in known)
                by_task.setdefault(task, []).append(f"  * {_where(block)}: {order}.")
    return [_nested(f"{text_title(task)}, lowest first:", lines) for task, lines in by_task.items()]


def _realised_lines(quality: Quality) -> list[str]:
    worst: tuple[float, Average] | None = None
    pairs = []
    for _, settings in quality.summary_blocks:
        practical = [s for s in settings if s.setting["mode"] == "practical" and s.realised is not None]
        for one in practical:
            gap = abs((one.realised or 0.0) - float(one.setting["sparsity_target"]))
            if worst is None or gap > worst[0]:
                worst = (gap, one)
        pairs += [
            f"{a.label} {a.realised:.3f} and {b.label} {b.realised:.3f}"
            for i, a in enumerate(practical)
            for b in practical[i + 1 :]
            if are_unequal(a, b)
        ]
    if worst is None:
        return []
    one = worst[1]
    lines = [
        f"Practical methods miss their target sparsity by at most {worst[0]:.3f} ({one.label} at "
        f"{one.setting['sparsity_target']:g} realises {one.realised:.3f})."
    ]
    if pairs:
        lines.append(f"Practical settings of unequal realised sparsity, not compared: {shortened(pairs)}.")
    return lines


def _speed_lines(speed: pd.DataFrame) -> list[str]:
    lines = []
    for panel in panels(speed) if not speed.empty else []:
        sparse = panel[~dense_rows(panel) & panel["speed_up"].notna() & ~panel["variant"].isin(PROBES)]
        if (sparse["clock"] == "graph").any():  # launch by launch dense is slower, and every speed-up looks better
            sparse = sparse[sparse["clock"] == "graph"]
        if sparse.empty:
            continue
        best = sparse.sort_values("speed_up").groupby(["method", *CHOICE, "backend"], sort=False).tail(1)
        parts = [
            f"{speed_label(row)} {row['speed_up']:.2f}x at {row['sparsity_target']:g}" for _, row in best.iterrows()
        ]
        against = sparse.iloc[0]["against"]
        lines.append(f"Speed, {panel_title(panel.iloc[0])}: over the fastest dense ({against}) {', '.join(parts)}.")
        slow = sparse[sparse["speed_up"] < 1]
        if len(slow):
            names = [f"{speed_label(r)} {r['variant']} at {r['sparsity_target']:g}" for _, r in slow.iterrows()]
            lines.append(f"Slower than dense there: {shortened(names)}.")
    return lines


def duels_table(quality: Quality) -> str:
    """How often COUNTDOWN's methods beat or lose to the baselines, task by task, with every loss listed."""
    rows = []
    for ours in COUNTDOWN:
        for other in BASELINES:
            found = _duels(quality, ours, other)
            if not found:
                continue
            won = [d for d in found if d.gain > 0 and d.settled]
            lost = [d for d in found if d.gain < 0 and d.settled]
            behind = sorted((d for d in found if d.gain < 0), key=lambda d: not d.settled)
            listed = shortened([d.where + " " + d.text + ("" if d.settled else " (not settled)") for d in behind], 8)
            counts = [str(len(won)), str(len(lost)), str(len(found) - len(won) - len(lost))]
            rows.append([f"{ours} against {other}", *counts, listed or "nowhere"])
    if not rows:
        return "No pair of methods with finished cells on the same documents.\n"
    header = ["pair", "better", "worse", "not settled", "where the first is behind"]
    return markdown_table(header, rows)


def _duels(quality: Quality, ours: str, other: str) -> list[Duel]:
    found = []
    for blocks, lower_is_better in ((quality.summary_blocks, False), (quality.perplexity_blocks, True)):
        for block, settings in blocks:
            for one, rival in _pairs(settings, ours, other):
                found += _duels_of(quality, block, one, rival, lower_is_better)
    return found


def _pairs(settings: Sequence[Average], ours: str, other: str) -> list[tuple[Average, Average]]:
    return [
        (one, rival)
        for one in settings
        for rival in settings
        if one.method == ours and rival.method == other and not are_unequal(one, rival)
    ]


def _duels_of(quality: Quality, block: dict[str, Any], one: Average, rival: Average, lower: bool) -> list[Duel]:
    found = []
    for task in one.cells:
        ours, theirs = one.cells[task], rival.cells.get(task)
        if cell_value(ours) is None or theirs is None or cell_value(theirs) is None:
            continue
        difference = quality.difference(ours, theirs)
        if difference is None:
            continue
        sign = -1 if lower else 1
        name = task if lower and not task.startswith(DECODE_PERPLEXITY) else task.partition(" ")[0]
        scope = f" scope {block['scope']}" if quality.has_scopes and block["scope"] else ""
        where = f"{name} {block['mode']} {block['sparsity_target']:g}{scope}"
        text = signed(difference, 1, 2) if lower else signed(difference)
        found.append(Duel(name, where, sign * difference[0], _excludes_zero(difference), text))
    return found


def _excludes_zero(found: Interval) -> bool:
    _, low, high = found
    return low is not None and high is not None and bool(np.sign(low) == np.sign(high) != 0)
