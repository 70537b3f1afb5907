"""Runs the missing cells of a matrix into the store, one model load for all of its cells, and keeps what is finished."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from suite.errors import CellInputError, InputError
from suite.runs.cells.accuracy import AccuracyCell, FitRequest
from suite.runs.cells.analysis import AnalysisCell
from suite.runs.cells.matrix import Matrix, ModelCell
from suite.runs.cells.speed import TimedCell
from suite.runs.store import CellStore, Record, StoreFullError, finite, sha256_of

Rerun = Literal["missing", "failed", "all", "none"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What one accuracy cell yields: partial CSV rows, one per metric; sparsity per layer; samples per document.

    ``choices`` are the number of choices and of right ones by document of a multiple choice task.
    ``predictor`` describes the predictor that was used: partial rows of predictor.csv, one per layer.
    """

    rows: list[dict[str, Any]]
    sparsity: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[str, str, float | str]] = field(default_factory=list)
    predictor: list[dict[str, Any]] = field(default_factory=list)
    choices: dict[str, tuple[int, int]] = field(default_factory=dict)


class Session(Protocol):
    """One loaded model."""

    def ensure_fit(
        self, request: FitRequest, key: str, folder: Path, *, remake: bool, mates: Mapping[str, FitRequest]
    ) -> str:
        """Make the fit below ``folder`` unless it is there, with its ``mates`` in one go; returns its SHA-256."""

    def run(self, cell: AccuracyCell, fits: Path) -> Outcome:
        """Measure one cell."""

    def analyse(self, cell: AnalysisCell) -> Outcome:
        """Analyse the model of one cell; its rows are those of cif_caf.csv and activations.csv."""


class Executor(Protocol):
    """Does the work; the runs' own is ``suite.runs.work.worker.LocalExecutor``."""

    def session(self, cell: ModelCell | TimedCell) -> contextlib.AbstractContextManager[Session]:
        """Load the model of a cell's load group."""

    def time(self, cells: Sequence[TimedCell], fits: Path) -> list[dict[str, Any]]:
        """Time the cells of one group interleaved, with their fits; one partial speed row a cell, in order."""


class Runner:
    """Runs a matrix; what is finished is in the store, whatever happens.

    Parameters
    ----------
    matrix, executor, store
    fits : Path
        Folder of the fits.
    rerun : ``missing`` computes what has no record; ``failed`` also what failed; ``all`` everything, fits too;
        ``none`` nothing.
    no_fit : refuse to make a missing fit.
    say : gets one line per event.
    """

    def __init__(
        self,
        matrix: Matrix,
        executor: Executor,
        store: CellStore,
        fits: Path,
        *,
        rerun: Rerun = "missing",
        no_fit: bool = False,
        say: Say = lambda line: None,
        progress: bool = False,
    ) -> None:
        self._matrix, self._executor, self._store, self._fits = matrix, executor, store, fits
        self._rerun, self._no_fit, self._say, self._progress = rerun, no_fit, say, progress
        self._fit_sha256: dict[str, str] = {}
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
        groups = [list(group) for _, group in groupby(self._matrix.speed, key=lambda cell: cell.group)]
        speed = [group for group in groups if any(self._is_pending(records[cell.key]) for cell in group)]
        self._recorded_fits(records, {cell.key for cell in (*of_models, *chain.from_iterable(speed))})
        if self._no_fit:
            self._need_fits([*of_models, *chain.from_iterable(speed)])
        self._refuse_problems()
        total = len(of_models) + sum(map(len, speed))
        rest, what = total, "to run"
        if self._rerun == "none":
            rest, what = sum(record is None for record in records.values()), "missing"
        refused = f", {len(self._bad_input)} without their task" if self._bad_input else ""
        cached = len(self._matrix.keys) - rest - len(self._bad_input)
        self._say(f"{len(self._matrix.keys)} cells: {cached} cached, {rest} {what}{refused}")
        if not total:
            return
        quiet_s = 0.1 if sys.stderr.isatty() else 30  # a log file gets a line of progress now and then
        with tqdm(
            total=total,
            unit="cell",
            disable=not self._progress,
            file=sys.stderr,
            mininterval=quiet_s,
            dynamic_ncols=True,
        ) as bar:
            for _, cells in groupby(of_models, key=lambda cell: cell.load_group):
                self._run_model(list(cells), bar)
            for group in speed:
                self._run_speed(group, bar)
        if len(self._bad_input) == len(self._matrix.keys):  # nothing is hidden by stopping
            raise InputError(" | ".join(dict.fromkeys(self._bad_input.values())))

    def _refuse_problems(self) -> None:
        """Record the cells whose task cannot be prepared as failed, each time anew: the reason may be another one."""
        for cell in self._matrix.of_models:
            if cell.problem and self._rerun == "none":
                raise InputError(cell.problem)  # its measured cell, if there is one, cannot be found
            if cell.problem:
                self._put_bad_input(cell, cell.problem, 0.0)

    def _put_bad_input(self, cell: ModelCell, reason: str, elapsed_s: float) -> None:
        self._bad_input[cell.key] = reason
        self._say(f"failed: {cell.label}: {reason}")
        self._store.put(_record(cell, "failed", reason=reason, bad_input=True, elapsed_s=elapsed_s))

    def fit(self) -> None:
        """Make the fits of all cells that are missing; raises what making them raises."""
        for _, cells in groupby(self._matrix.fitted, key=lambda cell: (cell.model, cell.dtype, cell.device)):
            missing = {cell.fit_key: cell for cell in cells if cell.fit_key and not self._has_fit(cell.fit_key)}
            if missing:
                with self._executor.session(next(iter(missing.values()))) as session:
                    for cell in missing.values():
                        self._fit(cell, session)

    def _has_fit(self, key: str) -> bool:
        return any(self._fits.glob(f"{key}*"))

    def _is_pending(self, record: Record | None) -> bool:
        if self._rerun == "none":
            return False
        if record is None or self._rerun == "all" or record.get("bad_input"):  # the user may have mended it
            return True
        return record["status"] == "failed" and self._rerun == "failed"

    def _is_done_elsewhere(self, key: str) -> bool:
        """Whether another process has stored the cell since this run looked (called under the cell's lock)."""
        record = self._store.get(key)
        return record is not None and record["sha256"] != self._seen[key]

    def _recorded_fits(self, records: Mapping[str, Record | None], pending: set[str]) -> None:
        """Outputs of fits that cached cells were measured with: a new output may not be mixed with them."""
        for cell in self._matrix.fitted:
            record = records[cell.key]
            if cell.fit_key and cell.key not in pending and record and record.get("fit_sha256"):
                known = self._fit_sha256.setdefault(cell.fit_key, record["fit_sha256"])
                self._same_fit(cell, known, record["fit_sha256"])

    @staticmethod
    def _same_fit(cell: AccuracyCell | TimedCell, known: str, found: str) -> None:
        if known != found:
            raise InputError(
                f"fit {(cell.fit_key or '')[:16]} of {cell.label} has two outputs ({known[:12]}, {found[:12]}): cells of "
                "both cannot be mixed; run again with --rerun all"
            )

    def _need_fits(self, cells: Sequence[ModelCell | TimedCell]) -> None:
        missing = [c for c in cells if c.fit_key and not self._has_fit(c.fit_key)]
        if missing:
            raise InputError(
                f"{len(missing)} cells need a fit that is missing, first {missing[0].label}: "
                "leave out --no-fit, or make it with `countdown-suite fit`"
            )

    def _run_model(self, cells: list[ModelCell], bar: tqdm[Any]) -> None:
        with contextlib.ExitStack() as stack:
            session: Session | None = None
            failure: Exception | None = None  # a model that did not load is not tried again for every cell
            waiting: list[ModelCell] = []
            for cell, last in chain(((c, False) for c in self._shared_out(cells)), _later(waiting)):
                with self._store.lock(cell.key, wait=last) as held:
                    if not held:
                        waiting.append(cell)
                        continue
                    bar.set_postfix_str(cell.label)
                    if not self._is_done_elsewhere(cell.key):
                        with self._recording(cell):
                            if failure is not None:
                                raise failure
                            if session is None:
                                try:
                                    session = stack.enter_context(self._executor.session(cell))
                                except InputError as error:
                                    # with other models it fails its own cells, and the others run
                                    failure = CellInputError(str(error)) if self._has_other_models(cell) else error
                                    raise failure from error
                                except Exception as error:
                                    failure = error
                                    raise
                            self._measure(cell, session)
                    bar.update()

    def _has_other_models(self, cell: ModelCell) -> bool:
        return any(other.load_group != cell.load_group for other in self._matrix.of_models)

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
            fit_sha256 = self._fit(cell, session)
            outcome = session.run(cell, self._fits)
        for row in outcome.rows:
            if not finite(row):
                raise ArithmeticError(f"metric {row.get('metric')} of {cell.label} is not finite: {row.get('value')}")
        if not finite([value for _, _, value in outcome.samples]):
            raise ArithmeticError(f"a sample of {cell.label} is not finite (NaN or inf)")
        self._store.put(
            _record(
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

    def _fit(self, cell: AccuracyCell | TimedCell, session: Session) -> str | None:
        if cell.fit is None or cell.fit_key is None:
            return None
        known = self._fit_sha256.get(cell.fit_key)
        lock = cell.fit_key if cell.fit.options is None else sha256_of(repr(cell.fit.shared))
        with self._store.lock(f"fit-{lock[:32]}"):
            remake = self._rerun == "all" and known is None
            mates: dict[str, FitRequest] = {}
            if remake or not self._has_fit(cell.fit_key):
                self._say(f"fitting {cell.fit.method} {cell.fit.sparsity:g} {cell.fit.estimator} on {cell.fit.model}")
                mates = self._mates(cell.fit)
            found = session.ensure_fit(cell.fit, cell.fit_key, self._fits, remake=remake, mates=mates)
        self._same_fit(cell, known or found, found)
        self._fit_sha256[cell.fit_key] = found
        return found

    def _mates(self, fit: FitRequest) -> dict[str, FitRequest]:
        """Missing predictors that are made with this one on the same activations, by key."""
        if fit.options is None:
            return {}
        fits = self._matrix.fits.items()
        return {key: one for key, one in fits if one.shared == fit.shared and not self._has_fit(key)}

    @contextlib.contextmanager
    def _recording(self, cell: ModelCell) -> Iterator[None]:
        """Turn a failure of the cell into a failed record with its log; bad input, a full disk and Ctrl-C go on up."""
        start = time.perf_counter()
        try:
            yield
        except CellInputError as error:
            self._put_bad_input(cell, str(error), time.perf_counter() - start)
        except (InputError, StoreFullError):
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  a cell may fail in any way, and the others must still run
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._say(f"failed: {cell.label}: {reason}")
            self._store.put(
                _record(
                    cell, "failed", reason=reason, log=traceback.format_exc(), elapsed_s=time.perf_counter() - start
                )
            )

    def _run_speed(self, cells: Sequence[TimedCell], bar: tqdm[Any]) -> None:
        with self._store.lock("speed"):  # two timings at once would measure each other
            bar.set_postfix_str(f"timing {cells[0].group}")
            if not all(self._is_done_elsewhere(cell.key) for cell in cells):
                self._time(cells)
            bar.update(len(cells))

    def _time(self, cells: Sequence[TimedCell]) -> None:
        start = time.perf_counter()
        try:
            if fitted := [cell for cell in cells if cell.fit_key]:
                with self._executor.session(fitted[0]) as session:
                    for cell in fitted:
                        self._fit(cell, session)
            rows = self._executor.time(cells, self._fits)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001  as in _recording
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._say(f"failed: timing {cells[0].group}: {reason}")
            log, elapsed = traceback.format_exc(), time.perf_counter() - start
            for cell in cells:
                self._store.put(_record(cell, "failed", reason=reason, log=log, elapsed_s=elapsed / len(cells)))
            return
        elapsed = (time.perf_counter() - start) / len(cells)
        for cell, row in zip(cells, rows, strict=True):
            status, reason = str(row.get("status", "ok")), str(row.get("reason") or "")
            if not finite(row):
                status, reason, row = "failed", "a measured value is not finite (NaN or inf)", {}
            if status == "failed":
                self._say(f"failed: {cell.label}: {reason}")
            fit = self._fit_sha256.get(cell.fit_key or "")
            self._store.put(_record(cell, status, reason=reason, rows=[row], fit_sha256=fit, elapsed_s=elapsed))


def _later(waiting: list[ModelCell]) -> Iterator[tuple[ModelCell, bool]]:
    """Cells that another process held when they were tried first; this time they are waited for."""
    while waiting:
        yield waiting.pop(0), True


def _record(cell: ModelCell | TimedCell, status: str, *, elapsed_s: float, **values: Any) -> Record:
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
