"""Tables of the report, one file per theme; in the order of REPORT.md."""

from __future__ import annotations

from suite.report.objects import ReportTable
from suite.report.tables import (
    accuracy,
    chance,
    decode_check,
    equal_bytes,
    expectations,
    fits,
    groups,
    pairs,
    perplexity,
    predictors,
    scope,
    size,
    speed,
)

TABLES: tuple[ReportTable, ...] = (
    *equal_bytes.TABLES,
    *accuracy.TABLES,
    *groups.TABLES,
    *pairs.TABLES,
    *expectations.TABLES,
    *size.TABLES,
    *chance.TABLES,
    *scope.TABLES,
    *fits.TABLES,
    *perplexity.TABLES,
    *predictors.TABLES,
    *speed.TABLES,
    *decode_check.TABLES,
)
