"""A group of cells: those that share one loaded model, or are timed interleaved. Run in this process or in another."""

from __future__ import annotations

import contextlib
import datetime
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

from suite.errors import CellInputError, InputError
from suite.runs.cells.analysis import AnalysisCell
from suite.runs.cells.base import Cell
from suite.runs.cells.matrix import ModelCell
from suite.runs.cells.speed import TimedCell
from suite.runs.fits import FitRequest, Outputs, has_fit
from suite.runs.store import CellStore, Record, StoreFullError, finite, sha256_of
from suite.runs.work.base import Session, Worker

Rerun = Literal["missing", "failed", "all", "none"]


@dataclass(frozen=True)
class Group:
    """Cells that are run in one go, and what they have to know of the run around them; it can be pickled.

    Parameters
    ----------
    cells : all with a model, or all timed
    results : folder of the store
    fits : folder of the fits
    rerun : as of the run; ``all`` makes fits anew, too
    seen : SHA-256 of each cell's record when the run began: another one is of another process
    outputs : what fits came out as, by key, as far as the run knows
    requests : all fits of the run, by key: predictors on the same activations are made together
    is_alone : no other model is in the run, so that one that cannot be loaded stops it
    """

    cells: Sequence[Cell]
    results: Path
    fits: Path
    rerun: Rerun = "missing"
    seen: Mapping[str, str | None] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    requests: Mapping[str, FitRequest] = field(default_factory=dict)
    is_alone: bool = True

    @property
    def is_timed(self) -> bool:
        """Whether its cells are timed: while they are, nothing else may run on their machine."""
        return any(isinstance(cell, TimedCell) for cell in self.cells)


@dataclass(frozen=True)
class Done:
    """What a group's run adds to the run around it: outputs of fits by their keys, reasons of bad input by cells' keys."""

    outputs: Mapping[str, str]
    bad_input: Mapping[str, str]


class Progress:
    """Gets what happens; this one is silent."""

    def say(self, line: str) -> None:
        """One line per event."""

    def begin(self, label: str) -> None:
        """Work on a cell begins."""

    def end(self, n_cells: int) -> None:
        """Cells are finished."""


def run_group(group: Group, worker: Worker, progress: Progress | None = None) -> Done:
    """Measure the cells of a group that no other process has measured since, into the store.

    Raises
    ------
    InputError, StoreFullError, KeyboardInterrupt
        As they come; the cells finished before are in the store.
    """
    run = _GroupRun(group, worker, progress or Progress())
    if timed := [cell for cell in group.cells if isinstance(cell, TimedCell)]:
        run.time(timed)
    if of_models := [cell for cell in group.cells if isinstance(cell, ModelCell)]:
        run.measure(of_models)
    return Done(run.outputs.known, run.bad_input)


def fit_group(group: Group, worker: Worker, progress: Progress) -> None:
    """Make the fits of a group's cells that are missing; raises what making them raises."""
    missing = {cell.fit_key: cell for cell in group.cells if cell.fit_key and not has_fit(group.fits, cell.fit_key)}
    if missing:
        run = _GroupRun(group, worker, progress)
        with worker.session(next(iter(missing.values()))) as session:
            for cell in missing.values():
                run.fit(cell, session)


class _GroupRun:
    def __init__(self, group: Group, worker: Worker, progress: Progress) -> None:
        self._group, self._worker, self._progress = group, worker, progress
        self._store = CellStore(group.results)
        self.outputs = Outputs(group.outputs)
        self.bad_input: dict[str, str] = {}

    def measure(self, cells: Sequence[ModelCell]) -> None:
        """Cells of one model: those that another process holds come last."""
        model = _Model(self._group, self._worker)
        waiting: list[ModelCell] = []
        with model:
            for cell, last in chain(((c, False) for c in self._shared_out(cells)), _later(waiting)):
                with self._store.lock(cell.key, wait=last) as held:
                    if not held:
                        waiting.append(cell)
                        continue
                    self._progress.begin(cell.label)
                    if not self._is_done_elsewhere(cell.key):
                        with self._recording(cell):
                            self._measure(cell, model.session(cell))
                    self._progress.end(1)

    def _is_done_elsewhere(self, key: str) -> bool:
        """Whether another process has stored the cell since this run looked (called under the cell's lock)."""
        record = self._store.get(key)
        return record is not None and record["sha256"] != self._group.seen.get(key)

    def _shared_out(self, cells: Sequence[ModelCell]) -> Iterator[ModelCell]:
        """The cells, task by task; tasks that another process is at come last.

        A process that starts with a task of its own builds it and computes its contexts for itself alone.
        """
        busy: list[ModelCell] = []
        for place, group in groupby(cells, key=lambda cell: cell.base):
            of_one = list(group)
            with self._store.lock(f"task-{sha256_of(repr(place))[:32]}", wait=False) as held:
                if held:
                    yield from of_one
                else:
                    busy += of_one
        yield from busy

    def _measure(self, cell: ModelCell, session: Session) -> None:
        start = time.perf_counter()
        fit_sha256 = None
        if isinstance(cell, AnalysisCell):
            outcome = session.analyse(cell)
        else:
            fit_sha256 = self.fit(cell, session)
            outcome = session.run(cell, self._group.fits)
        for row in outcome.rows:
            if not finite(row):
                raise ArithmeticError(f"metric {row.get('metric')} of {cell.label} is not finite: {row.get('value')}")
        if not finite([value for _, _, value in outcome.samples]):
            raise ArithmeticError(f"a sample of {cell.label} is not finite (NaN or inf)")
        self._store.put(
            new_record(
                cell,
                "ok",
                rows=outcome.rows,
                sparsity=outcome.sparsity,
                samples=outcome.samples,
                predictor=outcome.predictor,
                choices=outcome.choices,
                fit_sha256=fit_sha256,
                elapsed_s=time.perf_counter() - start,
            )
        )

    def fit(self, cell: Cell, session: Session) -> str | None:
        """SHA-256 of a cell's fit, which is made if it is missing; None if it needs none."""
        if cell.fit is None or cell.fit_key is None:
            return None
        lock = cell.fit_key if cell.fit.options is None else sha256_of(repr(cell.fit.shared))
        with self._store.lock(f"fit-{lock[:32]}"):
            remake = self._group.rerun == "all" and cell.fit_key not in self.outputs.known
            mates: dict[str, FitRequest] = {}
            if remake or not has_fit(self._group.fits, cell.fit_key):
                fit = cell.fit
                self._progress.say(f"fitting {fit.method} {fit.sparsity:g} {fit.estimator} on {fit.model}")
                mates = self._mates(fit)
            found = session.ensure_fit(cell.fit, cell.fit_key, self._group.fits, remake=remake, mates=mates)
        self.outputs.add(cell, found)
        return found

    def _mates(self, fit: FitRequest) -> dict[str, FitRequest]:
        """Missing predictors that are made with this one on the same activations, by key."""
        if fit.options is None:
            return {}
        fits = self._group.requests.items()
        return {key: one for key, one in fits if one.shared == fit.shared and not has_fit(self._group.fits, key)}

    @contextlib.contextmanager
    def _recording(self, cell: ModelCell) -> Iterator[None]:
        """Turn a failure of the cell into a failed record with its log; bad input, a full disk and Ctrl-C go on up."""
        start = time.perf_counter()
        try:
            yield
        except CellInputError as error:
            self.bad_input[cell.key] = str(error)
            put_bad_input(self._store, cell, str(error), time.perf_counter() - start, self._progress)
        except (InputError, StoreFullError):
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  a cell may fail in any way, and the others must still run
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._progress.say(f"failed: {cell.label}: {reason}")
            elapsed = time.perf_counter() - start
            self._store.put(new_record(cell, "failed", reason=reason, log=traceback.format_exc(), elapsed_s=elapsed))

    def time(self, cells: Sequence[TimedCell]) -> None:
        """Cells that are timed interleaved."""
        with self._store.lock("speed"):  # two timings at once would measure each other
            self._progress.begin(f"timing {cells[0].group}")
            if not all(self._is_done_elsewhere(cell.key) for cell in cells):
                self._time(cells)
            self._progress.end(len(cells))

    def _time(self, cells: Sequence[TimedCell]) -> None:
        start = time.perf_counter()
        try:
            if fitted := [cell for cell in cells if cell.fit_key]:
                with self._worker.session(fitted[0]) as session:
                    for cell in fitted:
                        self.fit(cell, session)
            rows = self._worker.time(cells, self._group.fits)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  as in _recording
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._progress.say(f"failed: timing {cells[0].group}: {reason}")
            log, elapsed = traceback.format_exc(), time.perf_counter() - start
            for cell in cells:
                self._store.put(new_record(cell, "failed", reason=reason, log=log, elapsed_s=elapsed / len(cells)))
            return
        elapsed = (time.perf_counter() - start) / len(cells)
        for cell, row in zip(cells, rows, strict=True):
            status, reason = str(row.get("status", "ok")), str(row.get("reason") or "")
            if not finite(row):
                status, reason, row = "failed", "a measured value is not finite (NaN or inf)", {}
            if status == "failed":
                self._progress.say(f"failed: {cell.label}: {reason}")
            fit = self.outputs.known.get(cell.fit_key or "")
            self._store.put(new_record(cell, status, reason=reason, rows=[row], fit_sha256=fit, elapsed_s=elapsed))


class _Model(contextlib.ExitStack):
    """The model of a group, loaded for the first cell that needs it; one that did not load is not tried again."""

    def __init__(self, group: Group, worker: Worker) -> None:
        super().__init__()
        self._group, self._worker = group, worker
        self._session: Session | None = None
        self._failure: Exception | None = None

    def session(self, cell: ModelCell) -> Session:
        """The loaded model."""
        if self._failure is not None:
            raise self._failure
        if self._session is None:
            try:
                self._session = self.enter_context(self._worker.session(cell))
            except InputError as error:
                # with other models it fails its own cells, and the others run
                self._failure = error if self._group.is_alone else CellInputError(str(error))
                raise self._failure from error
            except Exception as error:
                self._failure = error
                raise
        return self._session


def _later(waiting: list[ModelCell]) -> Iterator[tuple[ModelCell, bool]]:
    """Cells that another process held when they were tried first; this time they are waited for."""
    while waiting:
        yield waiting.pop(0), True


def put_bad_input(store: CellStore, cell: Cell, reason: str, elapsed_s: float, progress: Progress) -> None:
    """Record a cell whose task or model is at fault, to be tried again each time."""
    progress.say(f"failed: {cell.label}: {reason}")
    store.put(new_record(cell, "failed", reason=reason, bad_input=True, elapsed_s=elapsed_s))


def new_record(cell: Cell, status: str, *, elapsed_s: float, **values: Any) -> Record:
    """Record of a cell for the store."""
    empty: Record = {"reason": "", "rows": [], "sparsity": [], "samples": [], "predictor": [], "choices": {}}
    empty |= {"fit_sha256": None, "log": ""}
    return {
        **empty,
        "key": cell.key,
        "kind": cell.kind,
        "status": status,
        "key_fields": cell.key_fields,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **values,
        "elapsed_s": round(elapsed_s, 3),
    }
