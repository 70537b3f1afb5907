"""Table of methods against each other, with the pairs of the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from suite.report.claims import PAIRS
from suite.report.comparisons import AVERAGE, LEVEL, Row, corrected, pair_rows, settled
from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.tables import cells
from suite.report.task_names import task_order
from suite.report.text import MISSING, fixed, signed


def pairs(material: Material) -> Content | None:
    """Every pair of the claims: difference per task, of the average and of perplexities, stars by Holm's rule."""
    quality = material.quality
    if not quality.summary_tasks:
        return None
    shots = cells.shots_note(quality.ok)
    blocks = [
        _block(first, second, f"{model}, scope `{scope}`, {dtype}", rows)
        for first, second in PAIRS
        for (model, dtype, scope), rows in pair_rows(quality, first, second).items()
    ]
    return Content(blocks, after=shots if blocks else "None of these pairs has finished cells.\n" + shots)


def _block(first: str, second: str, place: str, rows: Sequence[Row]) -> Block:
    adjusted = corrected(rows)
    columns = _columns(rows)
    printed = [_printed(row, columns, partial(_star, adjusted, i)) for i, row in enumerate(rows)]
    header = ["setting", "realised", *(c.replace(" perplexity", ", perplexity %") for c in columns)]
    won, lost = settled(rows, adjusted)
    note = f"{len(adjusted)} comparisons, after correction {first} better in {won} and worse in {lost}."
    return Block(header, printed, f"{first} against {second}: {place}", [note])


def _columns(rows: Sequence[Row]) -> list[str]:
    found = {column for row in rows for column in row.comparisons}
    tasks = sorted((c for c in found if c != AVERAGE and not c.endswith("perplexity")), key=task_order)
    texts = sorted((c for c in found if c.endswith("perplexity")), key=lambda c: task_order(c.partition(" ")[0]))
    return [*tasks, *([AVERAGE] if AVERAGE in found else []), *texts]


def _printed(row: Row, columns: Sequence[str], star: Callable[[str], str]) -> list[str]:
    one, other = row.one, row.other
    labels = "" if (one.label, other.label) == (one.method, other.method) else f" {one.label} / {other.label}"
    realised = f"{fixed(one.realised, 3)} / {fixed(other.realised, 3)}" + (
        f" {cells.UNEQUAL}" if row.is_unequal else ""
    )
    texts = []
    for column in columns:
        found = row.comparisons.get(column)
        if found is None:
            texts.append(MISSING)
            continue
        ends = found.found
        if found.is_ratio:
            low, high = (None if end is None else math.expm1(end) for end in ends[1:])
            ends = (math.expm1(ends[0]), low, high)
        texts.append(signed(ends) + star(column))
    return [f"{one.setting['mode']} {one.setting['sparsity_target']:g}{labels}", realised, *texts]


def _star(adjusted: dict[tuple[int, str], float], row: int, column: str) -> str:
    return " *" if adjusted.get((row, column), 1.0) < LEVEL else ""


TABLES = (
    ReportTable(
        "methods_against_each_other",
        "Methods against each other",
        "Points of the summary metric, first method minus second, on the same documents with the 95 % interval (not "
        "corrected); perplexities: change of the first to the second in percent, lower is better. `*`: still different from "
        "0 at the 5 % level after Holm's correction over all comparisons of the block, whose number stands below it (normal "
        "approximation with the interval's width; the tasks and sparsities of a block share documents, which makes the "
        f"correction strict). {cells.UNEQUAL}: realised sparsities more than .01 apart, shown but not compared.",
        pairs,
    ),
)
