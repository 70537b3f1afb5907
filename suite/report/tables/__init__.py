"""Tables of the report, a file a theme; in the order of REPORT.md."""

from __future__ import annotations

from suite.report.objects import ReportTable
from suite.report.tables import accuracy, chance, decode_check, fits, pairs, perplexity, predictors, scope, speed

TABLES: tuple[ReportTable, ...] = (
    *accuracy.TABLES,
    *pairs.TABLES,
    *chance.TABLES,
    *scope.TABLES,
    *fits.TABLES,
    *perplexity.TABLES,
    *predictors.TABLES,
    *speed.TABLES,
    *decode_check.TABLES,
)
