"""Cells: what a matrix measures, one by one, each with the key of everything that decides its number. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, Protocol

from suite.config import (
    AccuracyBlock,
    MatrixConfig,
    MethodConfig,
    ModelConfig,
    Scope,
    TaskConfig,
)
from suite.errors import InputError, named
from suite.evaluation.tasks import ROLLING_TASKS, TaskSpec
from suite.fitting.options import PredictorOptions
from suite.registry import get_method, method_class
from suite.runs.guard import refuse_evaluated_text
from suite.runs.store import canonical, sha256_of

if TYPE_CHECKING:
    from suite.devices import Device
    from suite.evaluation.groups import Group
    from suite.methods.base import Mode

CellScope = Scope | Literal[""]  # "" for dense, which has no sparse position

ID_LENGTH = 16  # hex digits of a key that name a cell in the CSVs: 64 bits


class World(Protocol):
    """What keys are made of, as this machine has it; the runs' own is ``suite.runs.world.LocalWorld``."""

    device: Device

    def speed_device(self, kind: str) -> Device | None:
        """Device that speed cases of a kind, cpu or cuda, run on; None if there is none."""

    def openmp_waiting(self) -> str:
        """How the threads of a CPU wait for work, which decides times of microseconds."""

    def model_name(self, spec: str) -> str:
        """Short name of a model for the tables."""

    def weights(self, spec: str) -> str:
        """Fingerprint of a model's weights."""

    def members(self, tasks: Sequence[TaskConfig]) -> list[TaskConfig]:
        """Tasks with groups of tasks replaced by their members."""

    def groups(self, task: TaskConfig) -> Sequence[Group]:
        """Groups that a task's name stands for."""

    def task(self, task: TaskConfig) -> TaskSpec:
        """Find a task's data."""

    def data(self, task: TaskSpec) -> str:
        """Fingerprint of a task's data."""

    def fit_key(self, request: FitRequest) -> str:
        """Key of a fit."""

    def versions(self, kind: str) -> dict[str, str]:
        """Packages that decide numbers of a kind, accuracy or speed."""

    def code(self, kind: str, method: str) -> str:
        """Hash of the code that decides numbers of a kind with a method."""


@dataclass(frozen=True)
class PreparedTask:
    """A task with the fingerprint of its data, or the problem why it has none."""

    spec: TaskSpec
    data: str
    problem: str = ""

    @property
    def key_task(self) -> dict[str, Any]:
        """What of a cell's key the task is."""
        task = self.spec
        fields = {
            "name": task.name,
            "source": task.source,
            "num_fewshot": task.num_fewshot,
            "limit": task.limit,
            "options": dict(task.options),
            "data": self.data,
        }
        return fields | ({"chat": dict(task.chat)} if task.chat else {})


@dataclass(frozen=True)
class FitRequest:
    """A fit that a practical cell needs: thresholds, or with ``options`` a predictor, of one method at one sparsity."""

    model: str
    dtype: str
    method: str
    params: Mapping[str, Any] = field(hash=False)
    sparsity: float
    estimator: str
    calibration: str
    max_tokens: int
    seed: int
    options: PredictorOptions | None = None

    @property
    def shared(self) -> tuple[object, ...]:
        """What fits that are made in one go have in common."""
        return (self.model, self.dtype, self.calibration, self.max_tokens, self.seed, self.options)


@dataclass(frozen=True, eq=False)
class AccuracyCell:
    """Model x method x mode x sparsity x scope x task; ``params`` are the method's fields besides sparsity."""

    model: str
    model_name: str
    dtype: str
    device: str
    method: str
    params: Mapping[str, Any]
    mode: Mode
    sparsity: float
    scope: CellScope
    task: TaskSpec
    batch_size: int
    seed: int
    fit: FitRequest | None
    fit_key: str | None
    key_fields: Mapping[str, Any]
    problem: str = ""  # why the task cannot be prepared: the cell fails with this reason and nothing is loaded for it

    kind = "accuracy"

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that decides the number."""
        return sha256_of(self.key_fields)

    @property
    def id(self) -> str:
        """Name of the cell in the CSVs."""
        return self.key[:ID_LENGTH]

    @property
    def label(self) -> str:
        """One line for progress and messages."""
        setting = "dense" if self.mode == "none" else f"{self.method} {self.mode} {self.sparsity:g} {self.scope}"
        if self.fit is not None and self.fit.options is not None:
            setting += f" {self.fit.options.predictor}"
        return f"{self.model_name} {self.task.name} {setting}"

    @property
    def decided_seed(self) -> int:
        """Seed of what is random in the setting: its fit, or its noise; of the documents where it has neither."""
        return self.fit.seed if self.fit is not None else int(self.params.get("seed", self.seed))

    @property
    def load_group(self) -> tuple[str, str, str]:
        """Cells of one group share one loaded model."""
        return (self.model, self.dtype, self.device)

    @property
    def base(self) -> tuple[object, ...]:
        """Cells of one base are compared with the same dense cell."""
        return (*self.load_group, self.seed, self.batch_size, canonical(self.key_fields["task"]))


def expand(config: MatrixConfig, world: World) -> list[AccuracyCell]:
    """All accuracy cells of a matrix in running order: by model, seed and task, the dense cell of a task first.

    Raises
    ------
    InputError
        Unknown method, task or mode, a cell named twice, a fit on text that is evaluated.
    """
    cells: list[AccuracyCell] = []
    first_place: dict[str, tuple[str, AccuracyCell]] = {}
    for (model, seed), (place, block) in product(
        product(config.models, config.seeds), [(f"accuracy.{i}", block) for i, block in enumerate(config.accuracy)]
    ):
        for cell in _block_cells(config, world, model, seed, block, place):
            earlier = first_place.setdefault(cell.key, (place, cell))
            if earlier[1] is cell:
                cells.append(cell)
            elif cell.mode != "none":
                raise InputError(f"duplicate cell in {earlier[0]} and {place}: {cell.label}; name each setting once")
    refuse_evaluated_text([cell for cell in cells if not cell.problem])
    rank = {key: number for number, key in enumerate(dict.fromkeys((*c.load_group, c.seed, c.base) for c in cells))}
    return sorted(cells, key=lambda c: (rank[(*c.load_group, c.seed, c.base)], c.mode != "none"))


def _block_cells(
    config: MatrixConfig, world: World, model: ModelConfig, seed: int, block: AccuracyBlock, place: str
) -> Iterator[AccuracyCell]:
    for task_config in world.members(block.tasks):
        prepared = prepare_task(task_config, world, f"{place}.tasks")
        scopes = _scopes(prepared.spec, block)
        for method, mode, sparsity, fit in _settings(block, config, model, seed, place):
            own_scopes: list[CellScope] = [""] if mode == "none" else [*scopes]
            for scope in own_scopes:
                yield _cell(config, world, model, seed, prepared, method, mode, sparsity, fit, scope)


def prepare_task(config: TaskConfig, world: World, place: str) -> PreparedTask:
    """Find a task and read its data; where that fails, the reason stands in for both."""
    # it is in the cell's key, which no task that was prepared has: with its data mended, the cell is another one
    bare = TaskSpec(
        config.name,
        "hub" if config.source == "auto" else config.source,
        config.num_fewshot,
        config.limit,
        {},
        config.options,
    )
    spec = None
    try:
        with named(place):
            spec = world.task(config)
            return PreparedTask(spec, world.data(spec))
    except InputError as error:
        return PreparedTask(spec or bare, "", str(error))


def _scopes(task: TaskSpec, block: AccuracyBlock) -> list[Scope]:
    if task.is_text:
        return ["scored"]
    # of a rolling task the scope is part of its definition (PROTOCOL section 3): one cell per setting
    return ["all"] if task.name in ROLLING_TASKS else list(block.scopes)


def _settings(
    block: AccuracyBlock, config: MatrixConfig, model: ModelConfig, seed: int, place: str
) -> Iterator[tuple[MethodConfig, Mode, float, FitRequest | None]]:
    """Settings (method, mode, sparsity, fit) of a block, each checked by building its method."""
    for method in block.methods:
        with named(f"{place}.methods"):
            cls = method_class(method.name)
        if "seed" in cls.__dataclass_fields__ and "seed" not in method.params:
            method = method.model_copy(update={"params": {**method.params, "seed": seed}})
        _check_params(method, place)
        if cls.modes == ("none",):
            yield method, "none", 0.0, None
            continue
        for mode, sparsity in product(block.modes, block.sparsities):
            if mode not in cls.modes:
                known = ", ".join(cls.modes)
                raise InputError(f"{place}: method {method.name!r} has no mode {mode!r}; it has {known}")
            get_method(method.name, sparsity=sparsity, **method.params)
            if mode != "practical":
                yield method, mode, sparsity, None
                continue
            for fit_seed in block.fit_seeds or [seed]:
                for fit in _fits(config, block, model, method, sparsity, fit_seed):
                    yield method, mode, sparsity, fit


def _fits(
    config: MatrixConfig, block: AccuracyBlock, model: ModelConfig, method: MethodConfig, sparsity: float, seed: int
) -> Iterator[FitRequest]:
    """The fits of one practical setting: thresholds by every estimator, or every predictor."""
    text, predictor = config.calibration, config.predictor
    common = (model.id, model.dtype, method.name, method.params, sparsity)
    if not method_class(method.name).needs_predictor:
        for estimator, source in product(text.estimators, block.fit_sources or [text.source]):
            yield FitRequest(*common, estimator, source, text.max_tokens, seed)
        return
    sources = block.fit_sources or predictor.sources or [text.source]
    for options, zero_or_calibrated, source in product(predictor.options(), predictor.estimators, sources):
        yield FitRequest(*common, zero_or_calibrated, source, predictor.max_tokens, seed, options)


def _check_params(method: MethodConfig, place: str) -> None:
    get_method(method.name, **method.params)
    try:
        canonical(method.params)
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: params of method {method.name!r}: {error}; use numbers, texts, lists") from error
    seed = method.params.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"{place}: seed {seed!r} of method {method.name!r}: must be a whole number, 0 or more")


def _cell(
    config: MatrixConfig,
    world: World,
    model: ModelConfig,
    seed: int,
    prepared: PreparedTask,
    method: MethodConfig,
    mode: Mode,
    sparsity: float,
    request: FitRequest | None,
    scope: CellScope,
) -> AccuracyCell:
    fit_key = world.fit_key(request) if request else None
    task = prepared.spec
    return AccuracyCell(
        model=model.id,
        model_name=world.model_name(model.id),
        dtype=model.dtype,
        device=world.device.type,
        method=method.name,
        params=method.params,
        mode=mode,
        sparsity=sparsity,
        scope=scope,
        task=task,
        batch_size=config.batch_size,
        seed=seed,
        fit=request,
        fit_key=fit_key,
        key_fields={
            "kind": "accuracy",
            "weights": world.weights(model.id),
            "dtype": model.dtype,
            "method": method.name,
            "params": dict(method.params),
            "mode": mode,
            "sparsity": float(sparsity),
            "fit": fit_key,
            "scope": scope,
            "task": prepared.key_task,
            "batch_size": config.batch_size,
            "seed": seed,
            "device": world.device.type,
            "versions": world.versions("accuracy"),
            "code": world.code("accuracy", method.name),
        },
        problem=prepared.problem,
    )
