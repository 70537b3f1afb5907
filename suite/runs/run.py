"""One run from matrix to folder: expand, compute what is missing, assemble the view."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from suite.config import MatrixConfig
from suite.errors import InputError
from suite.files import is_part, refuse_links, remove_parts
from suite.runs import machine
from suite.runs.cells.accuracy import expand
from suite.runs.cells.analysis import expand_analysis
from suite.runs.cells.base import World
from suite.runs.cells.groups import group_cells
from suite.runs.cells.matrix import Matrix
from suite.runs.cells.speed import expand_speed
from suite.runs.executors.local import run_here
from suite.runs.group import Rerun
from suite.runs.runner import Executor, Runner, Say
from suite.runs.store import CellStore, write_atomically
from suite.runs.view.manifest import build_manifest, is_same, manifest_bytes, owned, sealed_later
from suite.runs.view.scrub import Scrubber
from suite.runs.work.base import Worker


@dataclass(frozen=True)
class Options:
    """How to run a matrix.

    Parameters
    ----------
    results : folder of cells, fits and runs
    folder : run folder; None: ``<results>/runs/<name>-<8 hex digits of its cells>``
    rerun, no_fit : see :class:`~suite.runs.runner.Runner`
    argv : command line, for the manifest
    executor : see :class:`~suite.runs.runner.Runner`
    """

    results: Path
    folder: Path | None = None
    rerun: Rerun = "missing"
    no_fit: bool = False
    argv: Sequence[str] = ()
    progress: bool = False
    executor: Executor = run_here

    @property
    def fits(self) -> Path:
        """Folder of the fits, beside the cells."""
        return self.results / "fits"


@dataclass(frozen=True)
class Finished:
    """A run folder and how its cells ended."""

    folder: Path
    n_ok: int
    n_skipped: int
    n_failed: int
    n_missing: int


def plan(config: MatrixConfig, world: World) -> Matrix:
    """All cells of a matrix.

    Raises
    ------
    InputError
        Something in the matrix is wrong, it has no cells, or no task of any cell can be prepared.
    """
    accuracy = expand(config, world)
    groups = group_cells(config, world, accuracy)
    matrix = Matrix(accuracy, expand_speed(config, world), expand_analysis(config, world), groups)
    if not matrix.keys:
        raise InputError(f"matrix {config.name!r} has no cells: give methods, sparsities and tasks or shapes")
    problems = [cell.problem for cell in matrix.cells]
    if all(problems):
        raise InputError(" | ".join(dict.fromkeys(problems)))
    return matrix


def run_folder(config: MatrixConfig, matrix: Matrix, options: Options) -> Path:
    """Folder of a run: of the same cells always the same, so that a repeated or resumed run writes the same view."""
    if options.folder is not None:
        return options.folder
    digest = hashlib.sha256("".join(sorted(matrix.keys)).encode()).hexdigest()[:8]
    return options.results / "runs" / f"{config.name}-{digest}"


def run(
    config: MatrixConfig,
    world: World,
    worker: Worker,
    options: Options,
    say: Say = lambda line: None,
    report: Callable[[Path], None] = lambda folder: None,
) -> Finished:
    """Run a matrix and write its folder; also when interrupted or stopped by bad input, with what is finished.

    Parameters
    ----------
    report : called with the folder once its CSVs are written, under the folder's lock.

    Raises
    ------
    InputError, StoreFullError, KeyboardInterrupt
        As they come; the cells finished before are in the store and in the folder.
    """
    matrix = plan(config, world)
    store = CellStore(options.results, say)
    runner = Runner(
        matrix,
        worker,
        store,
        options.fits,
        rerun=options.rerun,
        no_fit=options.no_fit,
        say=say,
        progress=options.progress,
        executor=options.executor,
    )
    folder = run_folder(config, matrix, options)
    _refuse_foreign(folder)
    try:
        runner.run()
    except (KeyboardInterrupt, InputError) as stop:
        if isinstance(stop, KeyboardInterrupt) or any(map(store.get, matrix.keys)):
            done = _write(config, world, matrix, store, folder, options)
            what = "stopped" if isinstance(stop, InputError) else "interrupted"
            say(f"{what}: {done.n_ok + done.n_skipped} of {len(matrix.keys)} cells are finished and kept in {folder}")
        raise
    return _write(config, world, matrix, store, folder, options, report)


def make_fits(config: MatrixConfig, world: World, worker: Worker, results: Path, say: Say) -> int:
    """Make the fits of a matrix that are missing, and return how many fits it has."""
    matrix = plan(config, world)
    Runner(matrix, worker, CellStore(results, say), results / "fits", say=say).fit()
    return len(matrix.fits)


def _refuse_foreign(folder: Path) -> None:
    """Refuse to write into a folder with files that no run has made.

    Raises
    ------
    InputError
        It is neither new nor empty nor a run folder, or something in it leads outside.
    """
    if folder.is_file():
        raise InputError(f"cannot write {folder}: it is a file; give a new folder with --out")
    refuse_links(folder)
    try:  # before anything is measured
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror}; give another folder with --results or --out"
        ) from error
    if all(map(is_part, folder.iterdir())):
        return
    try:
        owned(folder)
    except InputError as error:
        raise InputError(
            f"{folder} is not empty and not a run folder with a readable manifest.json: nothing is written there; give a "
            "new folder with --out"
        ) from error


def _model_folders(config: MatrixConfig) -> list[tuple[str, Path]]:
    """The folder that holds all models that are given by absolute paths, as ``model_dir``; numbered where none does."""
    parents = sorted({Path(model.id).parent for model in config.models if Path(model.id).is_absolute()})
    shared = {Path(os.path.commonpath(parents))} if parents else set()
    if shared and shared != {Path(parents[0].anchor)}:
        return [("model_dir", folder) for folder in shared]
    return [(f"model_dir_{number}", folder) for number, folder in enumerate(parents, 1)]


def _remove_stale(folder: Path, mine: frozenset[str], files: Mapping[str, bytes]) -> None:
    """Remove logs and CSVs of an earlier writing of the same run, and what a killed process left of one."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        stale = name in mine and name not in files and (name.startswith("logs/") or "/" not in name)
        if stale and path.suffix in (".txt", ".csv", ".gz"):
            path.unlink()
    remove_parts(folder)


def _write(
    config: MatrixConfig,
    world: World,
    matrix: Matrix,
    store: CellStore,
    folder: Path,
    options: Options,
    report: Callable[[Path], None] = lambda folder: None,
) -> Finished:
    from suite.runs.view.assemble import Assembly  # late: scipy takes 1.5 s, which a run can spend while it works

    records = {key: store.get(key) for key in matrix.keys}
    scrub = Scrubber(
        [
            ("results_dir", options.results),
            ("data_dir", config.data_dir),
            ("include_path", config.include_path),
            *_model_folders(config),
        ]
    )
    run_id = folder.resolve().name
    assembly = Assembly(run_id, matrix, records, scrub)
    # cells carried over were measured with the packages that their keys name, not with those that are installed here
    kind = "accuracy" if matrix.accuracy else "speed"
    packages = world.versions(kind) if options.rerun == "none" else machine.versions()
    manifest = build_manifest(run_id, config, matrix, records, world.device, scrub, options.argv, packages)
    with store.lock(f"run-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}"):
        files = assembly.files()
        _refuse_foreign(folder)
        if not is_same(folder, files, manifest):  # a finished run repeated: its report takes longer than all the rest
            mine = owned(folder) if (folder / "manifest.json").exists() else frozenset()
            # the manifest first: a folder with files in it and no manifest is somebody else's
            write_atomically(folder / "manifest.json", manifest_bytes(sealed_later(manifest, mine, files)))
            _remove_stale(folder, mine, files)
            for name, data in files.items():
                write_atomically(folder / name, data)
            report(folder)
    states = [record["status"] if record else "missing" for record in records.values()]
    return Finished(folder, *(states.count(state) for state in ("ok", "skipped", "failed", "missing")))
