"""Table of what the suite expects of its own methods: the order of perplexities, checked."""

from __future__ import annotations

import math

from suite.report.expectations import MODE, SPARSITY, Checked, checked
from suite.report.material import Material
from suite.report.objects import Block, Content, ReportTable
from suite.report.quality import cell_value
from suite.report.results import number
from suite.report.text import MISSING, fixed, percent, perplexity_text, signed

_COLUMNS = ["expected", "model", "text", "perplexities", "first to second, %", "bytes, %", "realised", "found"]


def expectations(material: Material) -> Content | None:
    """One row an expected order, model and text."""
    rows = [_row(one) for one in checked(material.quality)]
    return Content([Block(_COLUMNS, rows)]) if rows else None


def _row(one: Checked) -> list[str]:
    column = one.found.column
    both = [setting.cells[column] for setting in (one.first, one.second)]
    values = [cell_value(cell) for cell in both]
    ratio, low, high = (None if end is None else math.expm1(end) for end in one.found.found)
    return [
        f"{one.first.label} below {one.second.label}",
        one.model,
        column.partition(" ")[0],
        " / ".join(MISSING if value is None else perplexity_text(value) for value in values),
        MISSING if ratio is None else signed((ratio, low, high), digits=0),
        " / ".join(percent(number(cell["bytes_share"])) for cell in both),
        " / ".join(fixed(number(cell["sparsity_realized"]), 3) for cell in both),
        one.verdict,
    ]


TABLES = (
    ReportTable(
        "expectations",
        "What this suite expects of its own methods",
        f"Not a claim of the paper: the order of perplexities at sparsity {SPARSITY:g}, {MODE}, that follows from what each "
        "method knows of v. First to second: change of the perplexity with its paired 95 % interval, not corrected; bytes "
        "of both, of the dense MLP's; `(not settled)`: the interval includes no change.",
        expectations,
    ),
)
