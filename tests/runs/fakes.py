"""A quick world and worker: numbers are made from keys, so that equal cells give equal results."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from suite import schema
from suite.config import MatrixConfig, TaskConfig, build_config
from suite.devices import Device
from suite.evaluation.groups import Group
from suite.evaluation.tasks import TaskSpec
from suite.modeling.sources import ModelRef
from suite.runs.cells.accuracy import AccuracyCell
from suite.runs.cells.analysis import AnalysisCell
from suite.runs.fits import FitRequest
from suite.runs.store import sha256_of, write_atomically
from suite.runs.work.base import Outcome
from suite.statistics import standard_error


def matrix(**changes: Any) -> MatrixConfig:
    data: dict[str, Any] = {
        "name": "tiny",
        "models": [{"id": "a"}, {"id": "b"}],
        "accuracy": [
            {"methods": ["dense", "random", "cats"], "sparsities": [0.5, 0.9], "tasks": ["t1", "decode_perplexity"]},
            {"methods": ["cats"], "modes": ["practical"], "sparsities": [0.5, 0.9], "tasks": ["t1"]},
        ],
    }
    return build_config(data | changes, "test")


class FakeWorld:
    """Models and tasks that do not exist."""

    def __init__(self, config: MatrixConfig | None = None, code: str = "code") -> None:
        self.device = Device("cpu", "fake")
        self._code = code

    def prepare(self, spec: str, say: Any) -> None:
        """Nothing to download."""

    def model(self, spec: str) -> ModelRef:
        return ModelRef(spec, "folder", spec.upper() + "-135M", Path(spec), True, "", 1000)

    def speed_device(self, kind: str) -> Device | None:
        return self.device if kind == "cpu" else None

    def openmp_waiting(self) -> str:
        return "passive"

    def model_name(self, spec: str) -> str:
        return spec.upper()

    def weights(self, spec: str) -> str:
        return f"weights of {spec}"

    def members(self, tasks: Sequence[TaskConfig]) -> list[TaskConfig]:
        return list(tasks)

    def groups(self, task: TaskConfig) -> tuple[Group, ...]:
        return ()

    def task(self, task: TaskConfig) -> TaskSpec:
        chat = task.chat(task.name)
        return TaskSpec(task.name, "pack", task.num_fewshot, task.limit, options=task.options, chat=chat)

    def data(self, task: TaskSpec) -> str:
        return f"data of {task.name}"

    def fit_key(self, request: FitRequest) -> str:
        own = [
            request.method,
            dict(request.params),
            request.sparsity,
            request.estimator,
            request.seed,
            repr(request.options),
        ]
        return sha256_of([request.model, request.calibration, *own])

    def versions(self, kind: str) -> dict[str, str]:
        return {"torch": "0"}

    def code(self, kind: str, method: str) -> str:
        return self._code


class FakeWorker:
    """Yields numbers drawn from the key; ``fail`` names labels that raise, ``seconds`` is slept per cell."""

    def __init__(self, *, fail: Sequence[str] = (), seconds: float = 0.0, log: Path | None = None) -> None:
        self.fail, self.seconds, self.log = tuple(fail), seconds, log
        self.loads: list[str] = []
        self.ran: list[str] = []
        self.fitted: list[str] = []
        self.timed: list[list[str]] = []
        self.fit_text = "fit"

    @contextlib.contextmanager
    def session(self, cell: AccuracyCell) -> Iterator[FakeWorker]:
        self.loads.append(cell.model)
        yield self

    def ensure_fit(self, request: FitRequest, key: str, folder: Path, *, remake: bool, mates: Any) -> str:
        path = folder / f"{key}.json"
        if remake or not path.exists():
            self.fitted.append(key)
            write_atomically(path, self.fit_text.encode())
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def run(self, cell: AccuracyCell, fits: Path) -> Outcome:
        if self.seconds:
            time.sleep(self.seconds)
        self.ran.append(cell.label)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(cell.key + "\n")
        for text in self.fail:
            if text in cell.label:
                raise RuntimeError(f"no luck with {cell.label}\nsecond line")
        draw = random.Random(cell.key)
        metric = "perplexity" if cell.task.is_text else "acc"
        samples = [(str(i), metric, float(draw.random() < 0.5) + 0.1) for i in range(20)]
        if metric == "perplexity":
            samples += [(str(i), "perplexity.weight", 3.0) for i in range(20)]
        mean = sum(v for _, m, v in samples if m == metric) / 20
        value = math.exp(mean / 3) if metric == "perplexity" else mean
        weights = [3.0] * 20 if metric == "perplexity" else None
        stderr = standard_error([v for _, m, v in samples if m == metric], weights, metric)
        row = {
            "metric": metric, "filter": "none", "higher_is_better": metric == "acc", "value": value,
            "stderr": stderr, "chance": 0.5, "n_samples": 20, "task_version": "1", "sparse_share": 1.0, "num_fewshot": 0,
        }  # fmt: skip
        layers = [
            {"layer": i, "threshold": None, "sparsity_realized": cell.sparsity, "n_tokens": 7}
            for i in range(2 if cell.mode != "none" else 0)
        ]
        return Outcome([row], layers, samples)

    def analyse(self, cell: AnalysisCell) -> Outcome:
        self.ran.append(cell.label)
        if any(text in cell.label for text in self.fail):
            raise RuntimeError(f"no luck with {cell.label}")
        draw = random.Random(cell.key)
        sets = [
            {"row_method": name, "sparsity": s, "n_tokens": 9}
            | {c: draw.random() for c in ("cif_alive", "cif_dead", "caf_alive", "caf_dead")}
            for name in ("cats", "m-countdown")
            for s in cell.config.sparsities
        ]
        spread = [
            {"layer": i, "quantity": q, **{c: draw.random() for c in schema.ACTIVATIONS.names[4:-1]}, "n_tokens": 9}
            for i in range(11)
            for q in ("abs_up", "abs_act", "abs_product")
        ]
        return Outcome(sets + spread)

    def time(self, cells: Sequence[Any], fits: Path) -> list[dict[str, Any]]:
        self.timed.append([cell.label for cell in cells])
        rows = []
        for cell in cells:
            failed = any(text in cell.label for text in self.fail)
            status = {"status": "failed", "reason": "check failed"} if failed else {"status": "ok", "reason": ""}
            median = None if failed else random.Random(cell.key).uniform(1, 100)
            rows.append(
                {"sparsity_target": cell.case.sparsity, "latency_us_median": median, "check": "passed"} | status
            )
        return rows
