"""Command line ``countdown-suite``: verbs only. Exit codes: 0 done, 1 a cell failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from suite import __version__, cli_actions
from suite.cli_frame import guarded
from suite.config import MOST_DIGITS
from suite.errors import shown

app = typer.Typer(
    name="countdown-suite",
    help="Benchmark and reproducibility suite for COUNTDOWN: models x methods x sparsities in, tables and plots out.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _whole(text: str | int) -> int:
    digits = str(text).strip()  # a default comes as the number that it is
    if not digits.isdecimal() or len(digits) > MOST_DIGITS:
        raise typer.BadParameter(f"{shown(text)}: must be a whole number, 0 or more, of at most {MOST_DIGITS} digits")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{shown(text)} is not a number") from error


Config = Annotated[str, typer.Argument(help="Matrix: a YAML file, or a profile (embedded, small, paper, gpu-*).")]
Model = Annotated[
    list[str] | None,
    typer.Option(
        help="Model instead of the matrix' own: embedded, hub id, folder or .gguf; =DTYPE may follow. Repeatable."
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with <task>/<split>.jsonl, used instead of the hub.")]
IncludePath = Annotated[str | None, typer.Option(help="Folder of your own lm-eval task YAMLs.")]
Limit = Annotated[str | None, typer.Option(help="Documents a task, or none for all.")]
Only = Annotated[str | None, typer.Option(help="accuracy or speed.")]
BatchSize = Annotated[int | None, typer.Option(parser=_whole, metavar="N", help="Most sequences in a batch.")]
Seed = Annotated[
    list[int] | None, typer.Option(parser=_whole, metavar="N", help="Seed instead of the matrix' own. Repeatable.")
]
Rerun = Annotated[str, typer.Option(help="missing, failed (and missing), all, or none (write the folder only).")]
NoFit = Annotated[bool, typer.Option("--no-fit", help="Refuse to make a missing fit (exit 2).")]
Calibration = Annotated[
    str | None, typer.Option(help="Text of the fits: pydoc, file:PATH, train:TASK,TASK of --data-dir.")
]
Rank = Annotated[list[int] | None, typer.Option(parser=_whole, metavar="N", help="Rank of predictors. Repeatable.")]
ActivationBudget = Annotated[
    float | None,
    typer.Option(
        parser=_number, metavar="GIB", help="Memory for activations while predictors train (default: half of the free)."
    ),
]
Results = Annotated[
    Path | None, typer.Option(help="Folder of cells, fits and runs (default: $COUNTDOWN_RESULTS, else results).")
]
Out = Annotated[Path | None, typer.Option(help="Run folder (default: <results>/runs/<name>-<hash>).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"countdown-suite {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Benchmark and reproducibility suite for COUNTDOWN: models x methods x sparsities in, tables and plots out."""


@app.command("ls")
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="methods, tasks, models, profiles or runs; all by default.")
    ] = None,
    results: Results = None,
) -> None:
    """List methods, tasks, models, profiles and runs."""
    cli_actions.show_names(kind, results)


@app.command()
def info() -> None:
    """Show versions, device and folders."""
    cli_actions.show_info()


@app.command()
def check(
    config: Config,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    only: Only = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    calibration: Calibration = None,
    rank: Rank = None,
    results: Results = None,
) -> None:
    """Show cells, what is cached, an estimate of time, memory and download, and what is missing; runs nothing."""
    raise typer.Exit(cli_actions.check(config, results, _overrides(locals())))


@app.command()
def prepare(config: Config = "embedded", model: Model = None) -> None:
    """Download and convert the models of a matrix."""
    cli_actions.prepare(config, model)


@app.command()
def fit(
    config: Config,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    seed: Seed = None,
    calibration: Calibration = None,
    rank: Rank = None,
    activation_budget_gib: ActivationBudget = None,
    results: Results = None,
) -> None:
    """Make the fits that the practical modes of a matrix need."""
    raise typer.Exit(cli_actions.fit(config, results, _overrides(locals())))


@app.command()
def run(
    config: Config,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    only: Only = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    calibration: Calibration = None,
    rank: Rank = None,
    activation_budget_gib: ActivationBudget = None,
    rerun: Rerun = "missing",
    no_fit: NoFit = False,
    results: Results = None,
    out: Out = None,
) -> None:
    """Run the missing cells of a matrix, then write its CSVs, tables, plots and report."""
    raise typer.Exit(cli_actions.run(config, results, out, rerun, no_fit, _overrides(locals())))


@app.command()
def reproduce(
    profile: Annotated[
        str, typer.Option(help="embedded, small, paper, gpu-kernels, gpu-accuracy or gpu-decode.")
    ] = "embedded",
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    only: Only = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    calibration: Calibration = None,
    rank: Rank = None,
    activation_budget_gib: ActivationBudget = None,
    rerun: Rerun = "missing",
    no_fit: NoFit = False,
    results: Results = None,
    out: Out = None,
) -> None:
    """Run a profile from the start to its report."""
    raise typer.Exit(cli_actions.reproduce(profile, results, out, rerun, no_fit, _overrides(locals())))


@app.command()
def report(folder: Annotated[list[Path], typer.Argument(help="Run folder.")]) -> None:
    """Write claims, tables, plots and REPORT.md of run folders from their CSVs."""
    for one in folder:
        cli_actions.report(one)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Run folder A.")],
    second: Annotated[Path, typer.Argument(help="Run folder B.")],
) -> None:
    """Show what differs between two runs and why."""
    cli_actions.compare(first, second)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    recompute: Annotated[
        int, typer.Option(parser=_whole, metavar="N", help="Accuracy cells, sampled, to measure again.")
    ] = 0,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    model_dir: Annotated[
        list[str] | None,
        typer.Option(help="Folder of the models that the run had as {model_dir}; the n-th one is {model_dir_n}."),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Let --recompute run Python that the run names: module:Class, own tasks."),
    ] = False,
) -> None:
    """Check a run folder: hashes, keys, values against samples, tables and claims against CSVs."""
    folders = {"data_dir": data_dir, "include_path": include_path, "model_dir": model_dir}
    raise typer.Exit(cli_actions.verify(folder, recompute, folders, allow_code=allow_code))


@app.command()
def benchmark(
    shape: Annotated[list[str] | None, typer.Option(help="Shape of the layer. Repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Registry name, module:Class, or given. Repeatable.")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(parser=_number, metavar="S", help="Share of neurons skipped. Repeatable.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(parser=_whole, metavar="N", help="Threads (default: all). Repeatable.")
    ] = None,
    results: Results = None,
    rerun: Rerun = "missing",
) -> None:
    """Time one gated MLP layer, sparse against dense, and print the table."""
    raise typer.Exit(cli_actions.benchmark(shape, method, sparsity, threads, results, rerun))


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    model: Annotated[str, typer.Option(help="embedded, hub id, folder or .gguf.")] = "embedded",
    method: Annotated[str, typer.Option(help="Method beside dense.")] = "m-countdown",
    sparsity: Annotated[float, typer.Option(parser=_number, metavar="S", help="Share of neurons skipped.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(parser=_whole, metavar="N", help="Tokens to generate.")] = 64,
    backend: Annotated[str, typer.Option(help="auto, numba (skips the work) or masked.")] = "auto",
    device: Device = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System instruction before the prompt; needs --chat.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text at which generation ends. Repeatable.")] = None,
    no_fit: NoFit = False,
    results: Results = None,
) -> None:
    """Generate text dense and sparse; print both, their tokens per second and the realised sparsity."""
    cli_actions.generate(results, no_fit, {key: value for key, value in locals().items() if key in _GENERATE})


_GENERATE = (
    *("prompt", "model", "method", "sparsity", "max_new_tokens", "backend", "device"),
    *("chat", "system", "stop"),
)
_OVERRIDES = (
    *("model", "device", "data_dir", "include_path", "limit", "only", "batch_size", "seed", "calibration"),
    *("rank", "activation_budget_gib"),
)


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a verb that change the matrix, as :func:`suite.config.override` names them."""
    found = {name: options[name] for name in _OVERRIDES if options.get(name) is not None}
    renamed = {"model": "models", "seed": "seeds", "rank": "ranks"}
    return {renamed.get(name, name): value for name, value in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return guarded(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())
