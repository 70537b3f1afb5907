"""Times speed cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.fitting.artifacts import load_fit
from suite.speed.bench import run_group

if TYPE_CHECKING:
    from suite.runs.cells.speed import TimedCell


def time(cells: Sequence[TimedCell], fits: Path) -> list[dict[str, Any]]:
    """Time the cells of one group interleaved; one partial speed row a cell, in order."""
    states = {cell.case: load_fit(fits, cell.fit_key) for cell in cells if cell.fit_key}
    cases = [cell.case for cell in cells]
    rows = run_group(cases, seed=cells[0].seed, progress=lambda label: None, states=states)
    return [dict(row) for row in rows]
