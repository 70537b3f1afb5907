"""Figures of the report, a file a theme; in the order of REPORT.md."""

from __future__ import annotations

from suite.report.figures import coefficients, decode, kernels, layers, predictors, quality, size, speed_up, tradeoff
from suite.report.objects import ReportFigure

FIGURES: tuple[ReportFigure, ...] = (
    *tradeoff.FIGURES,
    *quality.FIGURES,
    *size.FIGURES,
    *speed_up.FIGURES,
    *coefficients.FIGURES,
    *predictors.FIGURES,
    *kernels.FIGURES,
    *decode.FIGURES,
    *layers.FIGURES,
)
