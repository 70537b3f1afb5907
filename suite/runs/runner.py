"""Runs the missing cells of a matrix into the store, group by group, and keeps what is finished."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from suite.errors import InputError
from suite.runs.cells.base import Cell
from suite.runs.cells.matrix import Matrix, ModelCell
from suite.runs.cells.speed import TimedCell
from suite.runs.executors.local import run_here
from suite.runs.fits import Outputs, need_fits
from suite.runs.group import Done, Group, Progress, Rerun, fit_group, put_bad_input
from suite.runs.store import CellStore, Record
from suite.runs.work.base import Worker

Say = Callable[[str], None]
Executor = Callable[[Iterable[Group], Worker, Progress], Iterator[Done]]


class Runner:
    """Runs a matrix; what is finished is in the store, whatever happens.

    Parameters
    ----------
    matrix, worker, store
    fits : Path
        Folder of the fits.
    rerun : ``missing`` computes what has no record; ``failed`` also what failed; ``all`` everything, fits too;
        ``none`` nothing.
    no_fit : refuse to make a missing fit.
    say : gets one line per event.
    executor : calls `run_group` for each group, in this process or others.
    """

    def __init__(
        self,
        matrix: Matrix,
        worker: Worker,
        store: CellStore,
        fits: Path,
        *,
        rerun: Rerun = "missing",
        no_fit: bool = False,
        say: Say = lambda line: None,
        progress: bool = False,
        executor: Executor = run_here,
    ) -> None:
        self._matrix, self._worker, self._store, self._fits = matrix, worker, store, fits
        self._rerun, self._no_fit, self._say, self._progress = rerun, no_fit, say, progress
        self._executor = executor
        self._outputs = Outputs()
        self._seen: dict[str, Any] = {}
        self._bad_input: dict[str, str] = {}  # reason by key

    def run(self) -> None:
        """Compute all cells that need it.

        Raises
        ------
        InputError
            Something in the input is wrong, or no task can be prepared; cells finished before are kept.
        StoreFullError
            The disk is full; cells finished before are kept.
        """
        records = {key: self._store.get(key) for key in self._matrix.keys}
        self._seen = {key: record and record["sha256"] for key, record in records.items()}
        of_models = [cell for cell in self._matrix.of_models if self._is_pending(records[cell.key])]
        of_models = [cell for cell in of_models if not cell.problem]
        timed = [list(group) for _, group in groupby(self._matrix.speed, key=lambda cell: cell.group)]
        timed = [group for group in timed if any(self._is_pending(records[cell.key]) for cell in group)]
        pending = [*of_models, *chain.from_iterable(timed)]
        keys = {cell.key for cell in pending}
        self._outputs.add_recorded([cell for cell in self._matrix.fitted if cell.key not in keys], records)
        if self._no_fit:
            need_fits(pending, self._fits)
        self._refuse_problems()
        self._tell(len(pending), records.values())
        if pending:
            self._execute(of_models, timed)
        if pending and len(self._bad_input) == len(self._matrix.keys):  # nothing is hidden by stopping
            raise InputError(" | ".join(dict.fromkeys(self._bad_input.values())))

    def fit(self) -> None:
        """Make the fits of all cells that are missing; raises what making them raises."""
        for _, cells in groupby(self._matrix.fitted, key=lambda cell: cell.load_group):
            fit_group(self._group(list(cells)), self._worker, _Bar(None, self._say))

    def _refuse_problems(self) -> None:
        """Record the cells whose task cannot be prepared as failed, each time anew: the reason may be another one."""
        for cell in self._matrix.of_models:
            if cell.problem and self._rerun == "none":
                raise InputError(cell.problem)  # its measured cell, if there is one, cannot be found
            if cell.problem:
                self._bad_input[cell.key] = cell.problem
                put_bad_input(self._store, cell, cell.problem, 0.0, _Bar(None, self._say))

    def _is_pending(self, record: Record | None) -> bool:
        if self._rerun == "none":
            return False
        if record is None or self._rerun == "all" or record.get("bad_input"):  # the user may have mended it
            return True
        return record["status"] == "failed" and self._rerun == "failed"

    def _tell(self, n_pending: int, records: Iterable[Record | None]) -> None:
        rest, what = n_pending, "to run"
        if self._rerun == "none":
            rest, what = sum(record is None for record in records), "missing"
        refused = f", {len(self._bad_input)} without their task" if self._bad_input else ""
        cached = len(self._matrix.keys) - rest - len(self._bad_input)
        self._say(f"{len(self._matrix.keys)} cells: {cached} cached, {rest} {what}{refused}")

    def _execute(self, of_models: Sequence[ModelCell], timed: Sequence[Sequence[TimedCell]]) -> None:
        quiet_s = 0.1 if sys.stderr.isatty() else 30  # a log file gets a line of progress now and then
        with tqdm(
            total=len(of_models) + sum(map(len, timed)),
            unit="cell",
            disable=not self._progress,
            file=sys.stderr,
            mininterval=quiet_s,
            dynamic_ncols=True,
        ) as bar:
            groups = [list(group) for _, group in groupby(of_models, key=lambda cell: cell.load_group)]
            todo: Iterable[Sequence[Cell]] = chain(groups, timed)
            for done in self._executor(map(self._group, todo), self._worker, _Bar(bar, self._say)):
                self._outputs.known.update(done.outputs)
                self._bad_input.update(done.bad_input)

    def _group(self, cells: Sequence[Cell]) -> Group:
        return Group(
            cells=cells,
            results=self._store.root,
            fits=self._fits,
            rerun=self._rerun,
            seen={cell.key: self._seen.get(cell.key) for cell in cells},
            outputs=dict(self._outputs.known),
            requests=self._matrix.fits,
            is_alone=len({cell.load_group for cell in self._matrix.of_models}) <= 1,
        )


class _Bar(Progress):
    def __init__(self, bar: tqdm[Any] | None, say: Say) -> None:
        self._bar, self._say = bar, say

    def say(self, line: str) -> None:
        self._say(line)

    def begin(self, label: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(label)

    def end(self, n_cells: int) -> None:
        if self._bar is not None:
            self._bar.update(n_cells)
