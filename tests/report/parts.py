"""Parts of a report by name, for tests of one of them."""

from __future__ import annotations

from pathlib import Path

from suite.report.figures import FIGURES
from suite.report.material import Material
from suite.report.objects import ReportFigure
from suite.report.quality import Quality
from suite.report.results import load_results
from suite.report.tables import TABLES

OF_ONE_MODEL = [one for one in FIGURES if one.name != "loss_against_size"]  # which compares models


def material(run: Path) -> Material:
    """A run folder, loaded."""
    return Material(load_results(run))


def quality(run: Path) -> Quality:
    """Its accuracy."""
    return material(run).quality


def figure(name: str) -> ReportFigure:
    """The figure of this name."""
    (found,) = (one for one in FIGURES if one.name == name)
    return found


def table_text(run: Path | Material, name: str) -> str:
    """Markdown of the table of this name; "" where the run has none."""
    (found,) = (one for one in TABLES if one.name == name)
    return found.markdown(run if isinstance(run, Material) else material(run))
