"""Accuracy cells: a setting on a task, with the key of everything that decides its number. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from suite.config import AccuracyBlock, MatrixConfig, MethodConfig, ModelConfig, Scope
from suite.errors import InputError, named
from suite.evaluation.tasks import ROLLING_TASKS, TaskSpec
from suite.modeling.names import named_parameters
from suite.registry import get_method, method_class
from suite.runs.cells.base import ID_LENGTH, Cell, World
from suite.runs.cells.guard import refuse_evaluated_text
from suite.runs.cells.tasks import PreparedTask, prepare_task
from suite.runs.cells.twins import refuse_twins
from suite.runs.fits import FitRequest, requests_of
from suite.runs.store import canonical
from suite.schema import ACCURACY

if TYPE_CHECKING:
    from suite.methods.base import Mode

CellScope = Scope | Literal[""]  # "" for dense, which has no sparse position


@dataclass(frozen=True, eq=False, kw_only=True)
class AccuracyCell(Cell):
    """Model x method x mode x sparsity x scope x task; ``params`` are the method's fields besides sparsity."""

    model_name: str
    method: str
    params: Mapping[str, Any]
    mode: Mode
    sparsity: float
    scope: CellScope
    task: TaskSpec
    batch_size: int
    seed: int

    kind = "accuracy"

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
    def base(self) -> tuple[object, ...]:
        """Cells of one base are compared with the same dense cell."""
        return (*self.load_group, base_of(self.key_fields))

    @property
    def columns(self) -> dict[str, Any]:
        """What of its rows in accuracy.csv is known before it is measured, with the paths of this machine."""
        options = self.fit.options if self.fit else None
        method = get_method(self.method, sparsity=self.sparsity, **self.params)
        # what is no choice stays empty, as in rows from before these columns
        factor = method.parameters() if method.factors else {}
        reads = options.predictor_input if options and options.is_closed_form else None
        return {
            "cell_id": self.id,
            "model": self.model_name,
            "dtype": self.dtype,
            "method": self.method,
            "mode": self.mode,
            "sparsity_target": self.sparsity,
            "estimator": self.fit.estimator if self.fit else None,
            "calibration": self.fit.calibration if self.fit else None,
            "fit_id": self.fit_key[:ID_LENGTH] if self.fit_key else None,
            "predictor": options.predictor if options else None,
            "rank": options.rank if options else factor.get("rank"),
            "predictor_input": reads or factor.get("predictor_input"),
            "exact_projection": method.exact_projection if method.factors else None,
            "scope": self.scope,
            "task": self.task.name,
            "data_fingerprint": self.key_fields["task"]["data"],
            "num_fewshot": self.task.num_fewshot,
            "chat": canonical(dict(self.task.chat)) if self.task.chat else None,
            "limit": self.task.limit,
            "batch_size": self.batch_size,
            "seed": self.decided_seed,
        }


def base_of(key_fields: Mapping[str, Any]) -> str:
    """What cells that are compared with the same dense cell have in common, of all that decides their numbers."""
    return canonical([key_fields[name] for name in ("weights", "dtype", "device", "seed", "batch_size", "task")])


def expand(config: MatrixConfig, world: World) -> list[AccuracyCell]:
    """All accuracy cells of a matrix in running order: by model, seed and task, the dense cell of a task first.

    Raises
    ------
    InputError
        Unknown method, task or mode, a cell named twice, a fit on text that is evaluated, settings that no column of
        accuracy.csv tells apart.
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
    refuse_twins(cells, ACCURACY)
    rank = {key: number for number, key in enumerate(dict.fromkeys((*c.load_group, c.seed, c.base) for c in cells))}
    return sorted(cells, key=lambda c: (rank[(*c.load_group, c.seed, c.base)], c.mode != "none"))


def _block_cells(
    config: MatrixConfig, world: World, model: ModelConfig, seed: int, block: AccuracyBlock, place: str
) -> Iterator[AccuracyCell]:
    size = named_parameters(world.model_name(model.id)) or 0
    if size < block.min_parameters or (block.max_parameters is not None and size >= block.max_parameters):
        return
    for task_config in world.members(block.tasks):
        prepared = prepare_task(task_config, world, f"{place}.tasks")
        scopes = _scopes(prepared.spec, block)
        for method, mode, sparsity, fit in _settings(block, config, model, seed, place):
            own_scopes: list[CellScope] = [""] if mode == "none" else [*scopes]
            for scope in own_scopes:
                yield _cell(config, world, model, seed, prepared, method, mode, sparsity, fit, scope)


def _scopes(task: TaskSpec, block: AccuracyBlock) -> list[Scope]:
    if task.is_text:
        return ["scored"]
    # of a rolling task the scope is part of its definition: one cell per setting
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
            made = get_method(method.name, sparsity=sparsity, **method.params)
            if (mode != "practical" or made.fixed_set) and not made.needs_calibration:
                yield method, mode, sparsity, None
                continue
            for fit_seed in block.fit_seeds or [seed]:
                for fit in requests_of(config, block, model, method, sparsity, fit_seed):
                    # ideal: moments and factors, which are the same whatever sets the thresholds
                    if mode == "practical" or fit.estimator == config.calibration.estimators[0]:
                        yield method, mode, sparsity, fit


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
