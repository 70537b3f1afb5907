"""Seconds of a cell with shared and with whole contexts, and what sharing and batch size change; Markdown on stdout.

    python tests/benchmarks/contexts.py DATA_DIR MODEL DTYPE [--device cuda] [--limit N] [--seconds S]

Run it alone on the device. Seconds are those of scoring from the second setting on: the task is built, and of the shared
way the contexts are there. No test: `pytest` does not collect it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from suite.config import load_config
from suite.evaluation.built_task import BuiltTask
from suite.evaluation.engine import Scorer
from suite.evaluation.evaluator import Evaluator
from suite.evaluation.results import TaskResult
from suite.evaluation.tasks import TaskSpec, resolve_task
from suite.methods.base import Method
from suite.modeling.loading import LoadedModel, load_model
from suite.registry import get_method

SHARED = ("dense", "cats", "m-countdown", "d-countdown")
WHOLE = ("dense", "d-countdown")
CHANGED_ON = ("arc_easy",)
# what is changed against shared contexts in batches of the profile's size: batch size, shared
CHANGES = {"the same again": (1024, True), "batch 32": (32, True), "whole": (1024, False)}


def say(*cells: object) -> None:
    """Write a line at once."""
    sys.stdout.write(" ".join(map(str, cells)) + "\n")
    sys.stdout.flush()


def method_of(name: str) -> Method:
    """The method at sparsity .8."""
    return get_method(name) if name == "dense" else get_method(name, sparsity=0.8)


def run(evaluator: Evaluator, task: TaskSpec, name: str) -> tuple[float, TaskResult]:
    """Seconds and result of one cell; the host waits for its sums, so nothing is under way at its end."""
    start = time.perf_counter()
    with torch.inference_mode():
        result, _ = evaluator.run(task, method_of(name), mode="none" if name == "dense" else "ideal")
    return time.perf_counter() - start, result


def seconds_table(loaded: LoadedModel, tasks: Sequence[TaskSpec], batch_size: int, until: float) -> None:
    """Print seconds per task, shared and whole, and their sums over the tasks that were reached in time."""
    columns = [f"{name}, shared" for name in SHARED] + [f"{name}, whole" for name in WHOLE]
    say("| task | first (built, contexts) |", " | ".join(columns), "|\n|---|" + "---:|" * (1 + len(columns)))
    rows = []
    for task in tasks:
        if time.monotonic() > until:
            say(f"(out of time before {task.name})")
            break
        evaluator = Evaluator(loaded, batch_size=batch_size)
        found = [run(evaluator, task, "dense")[0]] + [run(evaluator, task, name)[0] for name in SHARED]
        evaluator.lm.scorer = Scorer(loaded.model, batch_size=batch_size, share_contexts=False)
        found += [run(evaluator, task, name)[0] for name in WHOLE]
        rows.append(found)
        say(f"| {task.name} |", " | ".join(f"{value:.2f}" for value in found), "|")
    if rows:
        say("| sum |", " | ".join(f"{value:.2f}" for value in np.sum(rows, 0)), "|")


def answers(evaluator: Evaluator, task: TaskSpec, name: str) -> tuple[np.ndarray, dict[str, float]]:
    """Log-likelihood of every request, and by document whether it is answered right."""
    result = run(evaluator, task, name)[1]
    built = evaluator._build(task)
    assert isinstance(built, BuiltTask)
    values = np.array([float(instance.resps[0][0]) for instance in built.task.instances])
    return values, {document: value for document, metric, value in result.samples if metric == "acc"}


def changes_table(loaded: LoadedModel, task: TaskSpec) -> None:
    """Print how far log-likelihoods and answers move when batches are cut otherwise or contexts are not shared."""
    say(f"\n| {task.name} | median | 99 % | max | answers flipped |\n|---|---:|---:|---:|---:|")
    for name in SHARED:
        built = Evaluator(loaded, batch_size=1024)
        base, right = answers(built, task, name)
        for what, (batch_size, share) in CHANGES.items():
            evaluator = built if what == "the same again" else Evaluator(loaded, batch_size=batch_size)
            evaluator.lm.scorer.shares &= share
            values, now = answers(evaluator, task, name)
            moved = np.abs(values - base)
            flipped = sum(now[document] != right[document] for document in right)
            parts = [f"{x:.2g}" for x in (np.median(moved), np.quantile(moved, 0.99), moved.max())]
            say(f"| {name}, {what} |", " | ".join(parts), f"| {flipped} of {len(right)} |")


def main() -> None:
    """Run both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data_dir", "model", "dtype"):
        parser.add_argument(name)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seconds", type=float, default=600.0, help="for the first table; a task begun is finished")
    given = parser.parse_args()
    config = load_config("gpu-accuracy")
    named = {task.name: task for task in config.accuracy[0].tasks}
    tasks = [
        resolve_task(name, data_dir=given.data_dir, limit=given.limit or task.limit, options=task.options)
        for name, task in named.items()
    ]
    loaded = load_model(given.model, given.dtype, given.device)
    for task in tasks:
        if task.name in CHANGED_ON:
            changes_table(loaded, task)
    seconds_table(loaded, tasks, config.batch_size, time.monotonic() + given.seconds)


if __name__ == "__main__":
    main()
