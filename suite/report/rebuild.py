"""Whether the report in a run folder still follows from the run's CSVs."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd

from suite.report.material import Material
from suite.report.page import report_of
from suite.report.results import load_results

_RELATIVE = 1e-6  # of rebuilt figures: the files carry 10 digits, another numpy may round the sums otherwise


def rebuild_problems(folder: str | Path) -> list[str]:
    """Differences between the report in a run folder and the one that its CSVs give; none if it follows from them."""
    material = Material(load_results(folder))
    texts = report_of(material).texts
    problems = _strangers(Path(folder), set(texts))
    for name, text in texts.items():
        path = Path(folder) / name
        if not path.is_file():
            problems.append(f"{name}: is missing; write the report again")
            continue
        found = path.read_text(encoding="utf-8", errors="replace")
        differs = _csv_difference(found, text) if name.endswith(".csv") else _text_difference(found, text)
        if differs:
            problems.append(f"{name}: is not what the run's CSVs give: {differs}")
        if path.parent.name == "figures":
            problems += [f"{name}: has no {s}" for s in (".png", ".svg") if not path.with_suffix(s).is_file()]
    return problems


def _strangers(folder: Path, names: set[str]) -> list[str]:
    """Tables and figures in a run folder that are not part of its report."""
    drawn = {str(Path(n).with_suffix(s)) for n in names if n.startswith("figures/") for s in (".png", ".svg")}
    found = [path.relative_to(folder).as_posix() for path in [*folder.glob("tables/*"), *folder.glob("figures/*")]]
    return [f"{name}: is not part of the report" for name in sorted(found) if name not in names | drawn]


def _csv_difference(found: str, expected: str) -> str:
    try:
        ours, theirs = (pd.read_csv(io.StringIO(t), dtype=str, keep_default_na=False) for t in (expected, found))
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        return " ".join(str(error).split())
    if list(ours.columns) != list(theirs.columns) or len(ours) != len(theirs):
        return f"{len(theirs)} rows and {len(theirs.columns)} columns, expected {len(ours)} and {len(ours.columns)}"
    for column in ours:
        for line, (a, b) in enumerate(zip(ours[column], theirs[column], strict=True), 2):
            if a != b and not _close(a, b):
                return f"line {line}, column {column}: {b!r}, expected {a!r}"
    return ""


def _close(one: str, other: str) -> bool:
    try:
        return math.isclose(float(one), float(other), rel_tol=_RELATIVE, abs_tol=1e-9)
    except ValueError:
        return False


def _text_difference(found: str, expected: str) -> str:
    ours, theirs = expected.splitlines(), found.splitlines()
    for line, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
        if a != b:
            return f"line {line}: {b[:120]!r}, expected {a[:120]!r}"
    return "" if len(ours) == len(theirs) else f"{len(theirs)} lines, expected {len(ours)}"
