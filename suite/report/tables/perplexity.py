"""Table of perplexities, KL to dense and agreement with dense on running text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.quality import Average, Quality, columns_of, unequal
from suite.report.tables import cells
from suite.report.task_names import text_order, text_title
from suite.report.text import fixed, percent, perplexity_text


def perplexities(material: Material) -> Content | None:
    """Text metrics of every setting; best in bold by the paired interval (log-ratio for perplexities)."""
    quality = material.quality
    if quality.ok.empty:
        return None
    shots = cells.shots_note(quality.ok)
    if not quality.text_blocks:
        return Content([], after="No such rows in this run.\n" + shots, captioned=False)
    return Content([_block(quality, block, settings) for block, settings in quality.text_blocks], after=shots)


def _block(quality: Quality, block: dict[str, Any], settings: Sequence[Average]) -> Block:
    marked = unequal(settings)
    columns = sorted(columns_of(settings), key=text_order)
    best = {
        c: cells.best_of(settings, *cells.on_task(quality, c), higher=c.endswith("top1_agreement")) for c in columns
    }
    rows = []
    for one in settings:
        texts = {c: cells.shown(one.cells.get(c), _text_format(c.partition(" ")[2])) for c in columns}
        values = [cells.bold(text, one.label == best[c]) for c, text in texts.items()]
        rows.append([cells.name(one, block), cells.realised(one, marked), *values])
    header = ["method", "realised", *(text_title(c) for c in columns)]
    return Block(header, rows, cells.block_title(block), cells.block_notes(settings, marked))


def _text_format(metric: str) -> Callable[[float], str]:
    if metric == "top1_agreement":
        return percent
    return partial(fixed, digits=3) if metric in ("kl_dense", "bits_per_byte") else perplexity_text


TABLES = (
    ReportTable(
        "perplexity",
        "Perplexity, KL to dense, top-1 agreement",
        "Perplexity: lower is better. KL(dense || sparse) in nats per scored token: lower is better. Top-1 agreement with "
        f"dense in percent: higher is better. {cells.BOLD_RULE}",
        perplexities,
    ),
)
