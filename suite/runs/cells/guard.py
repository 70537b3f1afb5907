"""Refuses to fit on documents that are evaluated. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from suite.data_files import read_documents
from suite.errors import InputError
from suite.fitting.calibration import Calibration, fingerprints

if TYPE_CHECKING:
    from suite.evaluation.tasks import TaskSpec
    from suite.runs.cells.accuracy import AccuracyCell


def refuse_evaluated_text(cells: Sequence[AccuracyCell]) -> None:
    """Compare the paragraphs of every calibration text with those of the documents that its model is scored on.

    Tasks of the hub are not on disk and are not looked at.

    Raises
    ------
    InputError
        A paragraph of 100 characters or more is in both.
    """
    sources = sorted({(cell.fit.calibration, cell.fit.max_tokens) for cell in cells if cell.fit})
    tasks = {repr(cell.task): cell.task for cell in cells}
    if not sources:
        return
    evaluated = [(task.name, found) for task in tasks.values() if (found := fingerprints(_scored(task)))]
    for source, max_tokens in sources:
        own = Calibration(source, max_tokens).paragraphs() if evaluated else frozenset()
        for name, scored in evaluated:
            if shared := own & scored:
                raise InputError(
                    f"calibration {source}: {len(shared)} of its paragraphs are among the scored documents of task {name}; "
                    "fit on another text"
                )


def _scored(task: TaskSpec) -> Iterator[str]:
    """Texts of the scored split: test, else validation, else the one file there is."""
    files = {split: path for split, path in task.files.items() if path.is_file() and split not in ("train", "yaml")}
    path = files.get("test") or files.get("validation") or next(iter(files.values()), None)
    if path is None:
        return
    for row in read_documents(path):
        yield from _strings(row)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
