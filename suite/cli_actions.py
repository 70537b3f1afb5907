"""What the verbs of the command line do: they put runs and report together, and print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kernels_numba import OPENMP_TOO_LATE
from suite import settings
from suite.config import PROFILES, MatrixConfig, build_config, load_config, models_of, override
from suite.errors import InputError
from suite.registry import METHODS, did_you_mean, method_class

if TYPE_CHECKING:
    from suite.runs.generation import Generated
    from suite.runs.group import Rerun
    from suite.runs.machine import LocalWorld
    from suite.runs.run import Finished
    from suite.runs.work.worker import TorchWorker

_KINDS = ("methods", "tasks", "models", "profiles", "runs")
_RERUN = ("missing", "failed", "all", "none")


def show_names(kind: str | None, results: Path | None) -> None:
    """Print names of one kind, or of all kinds."""
    if kind is not None and kind not in _KINDS:
        raise InputError(f"ls {kind!r}{did_you_mean(kind, _KINDS)}")
    for one in (kind,) if kind else _KINDS:
        if kind is None:
            typer.echo(f"{one}:")
        for line in _names(one, results):
            typer.echo(line if kind else f"  {line}")


def _names(kind: str, results: Path | None) -> list[str]:
    if kind == "methods":
        return [f"{name:16}{', '.join(_modes(name)):40}{method_class(name).source}" for name in METHODS]
    if kind == "tasks":
        from suite.evaluation.tasks import known_tasks

        return known_tasks()
    if kind == "models":
        return _models()
    if kind == "profiles":
        return [f"{name:14}{load_config(name).title}" for name in PROFILES]
    folders = (results or settings.results_dir()).glob("*/*/manifest.json")
    return sorted(str(path.parent) for path in folders)


def _modes(name: str) -> list[str]:
    """Modes of a method; what practical takes beside thresholds is said."""
    cls = method_class(name)
    return [f"{mode} (needs predictor)" if mode == "practical" and cls.needs_predictor else mode for mode in cls.modes]


def _models() -> list[str]:
    from suite.modeling.loading import resolve_model

    specs = dict.fromkeys(model.id for name in PROFILES for model in load_config(name).models)
    refs = [resolve_model(spec) for spec in specs]
    return [f"{ref.spec:40}{'ready' if ref.available and ref.path else 'not on disk'}" for ref in refs]


def show_info() -> None:
    """Print versions, device and folders."""
    import platform

    from suite import devices
    from suite.runs import machine

    late = f", but {' and '.join(OPENMP_TOO_LATE)} loaded before: import suite first" if OPENMP_TOO_LATE else ""
    gpu, cpu = devices.gpu(), devices.cpu()
    lines = {
        "python": platform.python_version(),
        **machine.versions(),
        "cpu": f"{cpu.name}, {cpu.memory_bytes / 2**30:.0f} GiB of memory",
        "gpu": f"{gpu.name}, driver {gpu.driver}, {gpu.memory_bytes / 2**30:.0f} GiB" if gpu else "none",
        "OMP_WAIT_POLICY": settings.openmp_policy() + late,
        "results": str(settings.results_dir()),
        "cache": str(settings.cache_dir()),
        "hub cache": str(settings.hub_cache_dir()) + (" (offline)" if settings.hub_offline() else ""),
    }
    for name, value in lines.items():
        typer.echo(f"{name:18}{value or 'not installed'}")


def check(source: str, results: Path | None, overrides: dict[str, Any]) -> int:
    """Print what a run would take; 2 if something stands in its way."""
    from suite.runs.estimate import describe, estimate
    from suite.runs.machine import LocalWorld
    from suite.runs.run import plan
    from suite.runs.store import CellStore

    config = _config(source, overrides)
    world = LocalWorld(config)
    matrix = plan(config, world)
    folder = results or settings.results_dir()
    found = estimate(matrix, CellStore(folder, _say), world, folder)
    typer.echo(f"matrix    {config.name}: {config.title}")
    for line in describe(found, matrix, world):
        typer.echo(line)
    return 2 if found.blocking else 0


def prepare(source: str, models: list[str] | None) -> None:
    """Download and convert the models of a matrix, or those named instead; needs no data folder."""
    from suite.modeling.loading import prepare_model

    for model in models_of(load_config(source), models):
        ref = prepare_model(model.id)
        typer.echo(f"{ref.name}: ready")


def fit(source: str, results: Path | None, overrides: dict[str, Any]) -> int:
    """Make the fits of a matrix that are missing."""
    from suite.runs.run import make_fits

    config = _config(source, overrides)
    made = make_fits(config, _world(config), _worker(config), results or settings.results_dir(), _say)
    typer.echo(f"{made} fits are there")
    return 0


def run(
    source: str, results: Path | None, out: Path | None, rerun: str, no_fit: bool, overrides: dict[str, Any]
) -> int:
    """Run a matrix and write its folder."""
    return _run(_config(source, overrides), results, out, rerun, no_fit)


def reproduce(
    profile: str, results: Path | None, out: Path | None, rerun: str, no_fit: bool, overrides: dict[str, Any]
) -> int:
    """Run a profile."""
    if profile not in PROFILES:
        raise InputError(f"unknown profile {profile!r}{did_you_mean(profile, PROFILES)}")
    return _run(_config(profile, overrides), results, out, rerun, no_fit)


def _config(source: str, overrides: dict[str, Any]) -> MatrixConfig:
    return override(load_config(source), **overrides)


def _worker(config: MatrixConfig) -> TorchWorker:
    from suite.runs.work.worker import TorchWorker

    return TorchWorker(activation_budget_gib=config.predictor.activation_budget_gib, say=_say)


def _world(config: MatrixConfig) -> Any:
    """The world with every model on disk: a hub model is downloaded before cells get their keys."""
    from suite.runs.machine import LocalWorld

    world = LocalWorld(config)
    if config.accuracy or config.analysis:
        for model in config.models:
            world.prepare(model.id, _say)
    return world


def _stored_world(config: MatrixConfig, results: Path) -> LocalWorld:
    from suite.runs.machine import StoredWorld
    from suite.runs.store import CellStore

    return StoredWorld(config, CellStore(results, _say))


def _run(config: MatrixConfig, results: Path | None, out: Path | None, rerun: str, no_fit: bool) -> int:
    return _tell(_finish(config, results, out, rerun, no_fit))


def _finish(config: MatrixConfig, results: Path | None, out: Path | None, rerun: str, no_fit: bool) -> Finished:
    from suite.runs.run import Options
    from suite.runs.run import run as run_matrix

    options = Options(
        results=results or settings.results_dir(),
        folder=out,
        rerun=_rerun(rerun),
        no_fit=no_fit,
        argv=sys.argv[1:],
        progress=True,
    )
    world = _world(config) if options.rerun != "none" else _stored_world(config, options.results)
    return run_matrix(config, world, _worker(config), options, _say, report)


def _rerun(text: str) -> Rerun:
    for known in ("missing", "failed", "all", "none"):
        if text == known:
            return known
    raise InputError(f"--rerun {text!r}{did_you_mean(text, _RERUN)}")


def _tell(finished: Finished) -> int:
    skipped = f", {finished.n_skipped} skipped" if finished.n_skipped else ""
    typer.echo(f"{finished.n_ok} cells ok{skipped}, {finished.n_failed} failed; see {finished.folder / 'REPORT.md'}")
    if finished.n_failed:
        typer.echo("failed cells run again with --rerun failed", err=True)
    return 1 if finished.n_failed or finished.n_missing else 0


def report(folder: Path) -> None:
    """Write the report of a run folder and seal the folder with the hashes of its files."""
    from suite.report.page import write_report
    from suite.runs.view.manifest import seal

    write_report(folder)
    if (folder / "manifest.json").exists():
        seal(folder)


def compare(first: Path, second: Path) -> None:
    """Print what differs between two runs."""
    from suite.runs.audit.compare import compare as compare_runs

    for line in compare_runs(first, second):
        typer.echo(line)


def verify(folder: Path, n_recompute: int, folders: dict[str, Any], *, allow_code: bool = False) -> int:
    """Print the problems of a run folder; 1 if there are any."""
    from suite.files import links_in
    from suite.report.rebuild import rebuild_problems
    from suite.runs.audit.config import config_of
    from suite.runs.audit.recompute import recompute
    from suite.runs.audit.verify import problems_of, verify_files

    problems = verify_files(folder)
    if not any(links_in(folder)):
        problems += [p for p in problems_of(lambda: rebuild_problems(folder)) if p not in problems]
    if n_recompute and problems:
        typer.echo("nothing is measured again while there are problems", err=True)
    elif n_recompute:
        config = config_of(folder, folders, allow_code=allow_code)
        problems += recompute(folder, config, _world(config), _worker(config), n_recompute, _say)
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    typer.echo(f"{folder}: {len(problems)} problems" if problems else f"{folder}: verified")
    return 1 if problems else 0


def benchmark(
    shapes: list[str] | None,
    methods: list[str] | None,
    sparsities: list[float] | None,
    threads: list[int] | None,
    results: Path | None,
    rerun: str,
) -> int:
    """Time layers as a small matrix of their own and print the rows."""
    from suite.speed.bench import default_methods

    block: dict[str, Any] = {
        "shapes": shapes or ["llama-3.1-8b"],
        "methods": methods or default_methods(),
        "sparsities": sparsities or [0.7, 0.8, 0.9],
    }
    if threads:
        block["threads"] = threads
    config = build_config({"name": "benchmark", "title": "One gated MLP layer", "speed": [block]}, "command line")
    from suite.report.results import load_results
    from suite.report.speed import plain_table, with_speed_up

    finished = _finish(config, results, None, rerun, no_fit=False)
    for line in plain_table(with_speed_up(load_results(finished.folder).speed)):
        typer.echo(line)
    return _tell(finished)


def generate(results: Path | None, no_fit: bool, options: dict[str, Any]) -> None:
    """Print the text of the dense and of the sparse model, and how fast each was."""
    from suite.runs.generation import Request
    from suite.runs.generation import generate as generate_both

    request = Request(**{name: value for name, value in options.items() if value is not None})
    found = generate_both(request, (results or settings.results_dir()) / "fits", no_fit=no_fit, say=_say)
    for one in found:
        typer.echo(f"--- {one.method}: {_speed_of(one, found[0], request.sparsity)}")
        typer.echo(one.text)


def _speed_of(one: Generated, dense: Generated, target: float) -> str:
    """How fast a text came, against dense, and how sparse; of a model that ended at once there is nothing to time."""
    if one.tokens_per_s is None:
        return f"{one.n_tokens} token, then the model ended: no step to time; give another --prompt"
    speed = f"{one.n_tokens} tokens, {one.tokens_per_s:.1f} tokens/s"
    if one is dense:
        return speed
    if dense.tokens_per_s is not None:
        speed += f" ({one.tokens_per_s / dense.tokens_per_s:.2f}x dense)"
    if one.sparsity is not None:
        speed += f", sparsity {one.sparsity:.3f} (target {target:g})"
    return speed


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the progress bar, if there is one
