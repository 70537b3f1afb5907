"""The abstract's claims against the run: value, interval, verdict and reason (claims.csv)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from suite import schema
from suite.report.quality import (
    REALISED_TOLERANCE,
    Average,
    Interval,
    Quality,
    above_chance,
    are_unequal,
    cell_value,
)
from suite.report.results import number
from suite.report.speed import PROBES, panel_title, speed_label
from suite.report.text import own_name
from suite.statistics import FloatArray

# The paper's models; a claim about them stays untested until a run holds them.
PAPER_MODELS = ("Llama-3.1-8B-Instruct", "gemma-2-9b-it", "Qwen2.5-14B-Instruct", "phi-4")
C1_LOSS, C2_GAIN, C1_SPARSITY = 0.055, 0.294, 0.9  # the abstract's figures
C1_METHOD, C2_METHOD = "d-countdown", "m-countdown"
BASELINES = ("cats", "dejavu", "dejavu-abs")
COUNTDOWN = ("m-countdown", "d-countdown", "s-countdown")
INDIRECT = ("m-countdown", "cats")  # both rank by one projection, which needs no predictor
PAIRS = (INDIRECT, ("d-countdown", "dejavu"), ("d-countdown", "dejavu-abs"))  # held against each other on every task
C3_SPARSITIES = (0.7, 0.8, 0.9)
SAYS_C1 = "performance loss as low as 5.5 % with 90 % of computations omitted, ideally (D-COUNTDOWN)"
SAYS_C2 = "up to 29.4 % better performance preservation than existing methods (M-COUNTDOWN)"
SAYS_C3 = "faster in practice (no figure)"
CONSISTENT, INCONSISTENT, UNTESTED = "consistent", "inconsistent here", "untested"
NOT_SETTLED = "not settled by these documents"
Row = dict[str, Any]


def make_claims(quality: Quality, speed: pd.DataFrame) -> pd.DataFrame:
    """Rows of claims.csv.

    The verdict is that of the point estimate: C1 a relative loss of at most 5.5 %, C2 pairs a retention above the
    baseline's, C2 best cases at least 29.4 %, C3 a speed-up above 1. Whether the 95 % interval settles it stands in
    ``reason``.

    Parameters
    ----------
    quality : Quality
    speed : DataFrame
        From :func:`suite.report.speed.with_speed_up`.
    """
    rows: list[Row] = []
    for block, settings in quality.summary_blocks:
        dense = quality.dense_of(block, settings)
        if dense is not None:
            rows += _c1(quality, block, settings, dense) + _c2_pairs(quality, block, settings, dense)
    rows = sorted(rows, key=lambda row: str(row["claim"]))
    rows += _c2_best(rows) + _c3(speed)
    rows += _untested(quality, rows)
    frame = pd.DataFrame(
        [{c: row.get(c, "") for c in schema.CLAIMS.names} for row in rows], columns=schema.CLAIMS.names
    )
    for column in ("sparsity_target", "sparsity_realized", "value", "ci_low", "ci_high"):
        frame[column] = pd.to_numeric(frame[column].replace("", np.nan)).astype("float64")
    keys = ["claim", "model", "quantity", "mode", "scope", "against", "method", "sparsity_target"]
    return frame.sort_values(keys, kind="stable").reset_index(drop=True)


def _mean(means: Sequence[FloatArray], system: int) -> Any:
    return sum(m[system] for m in means) / len(means)


def _row(claim: str, one: Average, against: str, quantity: str, found: Interval, says: str) -> Row:
    return {
        "claim": claim,
        "model": one.setting["model"],
        "method": one.label,
        "against": against,
        "mode": one.setting["mode"],
        "scope": one.setting["scope"],
        "sparsity_target": one.setting["sparsity_target"],
        "sparsity_realized": one.realised,
        "quantity": quantity,
        "value": found[0],
        "ci_low": found[1],
        "ci_high": found[2],
        "abstract_says": says,
    }


def _judged(row: Row, figure: float, smaller_is_better: bool, text: str, what: str) -> Row:
    """Set verdict and reason by the side of ``figure`` (in words: ``what``) on which the point estimate lies."""
    value, low, high = row["value"], row["ci_low"], row["ci_high"]
    if smaller_is_better:
        meets = value <= figure
    else:
        meets = value >= figure > 0 or value > figure  # keeping as much as a baseline is not better
    if low is None or high is None:
        settled = f"no interval: {NOT_SETTLED}"
    elif low <= figure <= high:
        settled = f"the interval includes {what}: {NOT_SETTLED}"
    else:
        settled = f"the interval excludes {what}"
    row["verdict"] = CONSISTENT if meets else INCONSISTENT
    row["reason"] = f"{text}; {settled}"
    return row


def _averaged(quality: Quality, block: Row, settings: Sequence[Average]) -> list[str]:
    """Tasks of the block if every one of the settings has all of them, else none."""
    tasks = quality.tasks_of(block)
    complete = all(cell_value(one.cells.get(task)) is not None for one in settings for task in tasks)
    return tasks if complete else []


def _c1(quality: Quality, block: Row, settings: Sequence[Average], dense: Average) -> list[Row]:
    """C1 in both modes: the abstract speaks of the ideal one, what a predictor reaches stands beside it."""
    if block["sparsity_target"] != C1_SPARSITY:
        return []
    rows = []
    for one in settings:
        tasks = _averaged(quality, block, [one, dense]) if one.method == C1_METHOD else []
        if not tasks:
            continue
        note = _c1_note(one)
        found = quality.quantity([one, dense], tasks, lambda m: 1 - _mean(m, 0) / _mean(m, 1))
        if found is not None:
            row = _row("C1", one, "dense", "relative_loss_of_average", found, SAYS_C1)
            rows.append(
                _judged(row, C1_LOSS, True, f"relative loss of the average over {len(tasks)} tasks{note}", "5.5 %")
            )
        fair = [task for task in tasks if above_chance(dense.cells[task])[0]]
        found = _above_chance_loss(quality, one, dense, fair)
        if found is not None:
            row = _row("C1", one, "dense", "relative_loss_above_chance", found, SAYS_C1)
            text = (
                f"stricter reading, chance taken out, mean over the {len(fair)} tasks where dense is above chance{note}"
            )
            rows.append(_judged(row, C1_LOSS, True, text, "5.5 %"))
    return rows


def _c1_note(one: Average) -> str:
    """What sets a row apart from what the abstract speaks of."""
    note = ", practical: the abstract's figure is ideal" if one.setting["mode"] == "practical" else ""
    target = float(one.setting["sparsity_target"])
    if one.realised is not None and abs(one.realised - target) > REALISED_TOLERANCE + 1e-9:
        note += f", realised sparsity {one.realised:.3f} instead of {target:g}"
    return note


def _above_chance_loss(quality: Quality, one: Average, dense: Average, tasks: list[str]) -> Interval | None:
    chances = [float(dense.cells[task]["chance"]) for task in tasks]

    def loss(means: list[FloatArray]) -> Any:
        kept = [(m[0] - chance) / (m[1] - chance) for m, chance in zip(means, chances, strict=True)]
        return 1 - sum(kept) / len(kept)

    return quality.quantity([one, dense], tasks, loss) if tasks else None


def _c2_pairs(quality: Quality, block: Row, settings: Sequence[Average], dense: Average) -> list[Row]:
    rows = []
    for one in settings:
        for other in settings:
            if one.method != C2_METHOD or other.method not in BASELINES:
                continue
            tasks = _averaged(quality, block, [one, other, dense])
            if not tasks:
                continue
            difference = quality.quantity([one, other, dense], tasks, _retention_difference)
            ratio = quality.quantity([one, other], tasks, lambda m: _mean(m, 0) / _mean(m, 1) - 1)
            for quantity, found in (("retention_difference", difference), ("retention_ratio_minus_1", ratio)):
                if found is not None and np.isfinite(found[0]):
                    row = _row("C2", one, other.label, quantity, found, SAYS_C2)
                    row = _judged(row, 0.0, False, _c2_text(found[0], other.label, len(tasks)), "no difference")
                    if are_unequal(one, other):
                        row["reason"] += (
                            f"; unequal realised sparsity ({one.realised:.3f} against {other.realised:.3f}), "
                            "no fair comparison"
                        )
                    rows.append(row)
    return rows


def _c2_text(value: float, other: str, n_tasks: int) -> str:
    amount = "more than" if value > 0 else "less than" if value < 0 else "as much as"
    return f"average over {n_tasks} tasks: keeps {amount} {other}"


def _retention_difference(means: list[FloatArray]) -> Any:
    return (_mean(means, 0) - _mean(means, 1)) / _mean(means, 2)


def _c2_best(rows: Sequence[Row]) -> list[Row]:
    """Best case over sparsities of every pair, named as such."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["claim"] == "C2" and "no fair comparison" not in row["reason"]:
            key = tuple(row[c] for c in ("model", "method", "against", "mode", "scope", "quantity"))
            groups.setdefault(key, []).append(row)
    best = []
    for group in groups.values():
        top = dict(max(group, key=lambda row: float(row["value"])))
        top["quantity"] = f"best_case_{top['quantity']}"
        text = f"best case over {len(group)} sparsities (interval of that one alone, not corrected for the choice)"
        best.append(_judged(top, C2_GAIN, False, text, "29.4 %"))
    return best


def _c3(speed: pd.DataFrame) -> list[Row]:
    rows = []
    for _, row in speed.iterrows():
        wanted = row["method"] in COUNTDOWN and row["sparsity_target"] in C3_SPARSITIES
        if not wanted or row["status"] != "ok" or not np.isfinite(row["speed_up"]) or row["variant"] in PROBES:
            continue
        faster = row["speed_up"] > 1
        efficiency = number(row["efficiency"])
        reason = f"{panel_title(row)}, {row['backend']} {row['variant']}, {row['device_name']}"
        reason += f"; between quartiles {row['speed_up_low']:.2f} to {row['speed_up_high']:.2f}"
        reason += "" if efficiency is None else f"; efficiency {efficiency:.2f}"
        rows.append(
            {
                "claim": "C3",
                "model": row["model"] or row["model_shape"],
                "method": speed_label(row),
                "against": f"dense ({row['against']})",
                "mode": row["mode"],
                "sparsity_target": row["sparsity_target"],
                "sparsity_realized": row["sparsity_realized"],
                "quantity": f"speed_up_{row['level']}",
                "value": row["speed_up"],
                "abstract_says": SAYS_C3,
                "verdict": CONSISTENT if faster else INCONSISTENT,
                "reason": reason,
            }
        )
    return rows


def _untested(quality: Quality, rows: Sequence[Row]) -> list[Row]:
    """A row for every claim that this run says nothing about: for its own models and for the paper's."""
    models = [str(model) for model in dict.fromkeys(quality.rows["model"])]
    models += [model for model in PAPER_MODELS if model not in map(own_name, models)]
    wanted = [("C1", C1_METHOD, "dense", "relative_loss_of_average", SAYS_C1)]
    wanted += [("C2", C2_METHOD, against, "retention_difference", SAYS_C2) for against in BASELINES]
    wanted += [("C3", "", "dense", "speed_up_decode", SAYS_C3)]
    missing = []
    for model in dict.fromkeys(models):
        for claim, method, against, quantity, says in wanted:
            tested = any(
                row["claim"] == claim
                and row["model"] == model
                and (row["quantity"] == quantity if claim == "C3" else str(row["against"]).partition(" ")[0] == against)
                for row in rows
            )
            if not tested:
                run = model in set(quality.rows["model"])
                reason = "not in this run, or not finished" if run else "no run of this model here"
                missing.append(
                    {"claim": claim, "model": model, "method": method, "against": against, "quantity": quantity}
                    | {"abstract_says": says, "verdict": UNTESTED, "reason": reason}
                )
    return missing
