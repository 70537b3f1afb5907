"""Speed cells: cases of ``suite.speed`` with the key of everything that decides their time. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from suite.config import MatrixConfig
from suite.errors import InputError
from suite.fitting.options import PredictorOptions
from suite.registry import method_class
from suite.runs.cells import FitRequest, World
from suite.runs.store import sha256_of

if TYPE_CHECKING:
    from suite.speed.cases import SpeedCase

ID_LENGTH = 16


@dataclass(frozen=True, eq=False)
class TimedCell:
    """One speed case on one device; ``fit`` of a model with real weights that decodes with a sparse method."""

    case: SpeedCase
    seed: int
    group: str
    label: str
    key_fields: Mapping[str, Any]
    fit: FitRequest | None = None
    fit_key: str | None = None

    kind = "speed"
    problem = ""

    @property
    def model(self) -> str:
        """Model that a fit is made on."""
        return self.case.model_shape

    @property
    def dtype(self) -> str:
        """Type of its weights."""
        return self.case.dtype

    @property
    def device(self) -> str:
        """Where it is loaded."""
        return self.case.device

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that decides the time."""
        return sha256_of(self.key_fields)

    @property
    def id(self) -> str:
        """Name of the cell in the CSVs."""
        return self.key[:ID_LENGTH]


def expand_speed(config: MatrixConfig, world: World) -> list[TimedCell]:
    """All speed cells of a matrix, those of one group side by side; the first seed makes weights and inputs.

    Raises
    ------
    InputError
        Unknown shape or method, more threads than there are, a case named twice.
    """
    if not config.speed:
        return []
    from suite.speed.cases import make_cases

    cells: dict[str, TimedCell] = {}
    for number, block in enumerate(config.speed):
        axes = block.model_dump()
        for case in make_cases(axes.pop("shapes"), axes.pop("methods"), axes.pop("sparsities"), **axes):
            cell = _timed(case, config, world)
            if cell.key not in cells:
                cells[cell.key] = cell
            elif case.method != "dense":  # the dense case of a group is shared
                raise InputError(f"duplicate cell in speed.{number}: {cell.label}; name each case once")
    rank = {group: number for number, group in enumerate(dict.fromkeys(cell.group for cell in cells.values()))}
    return sorted(cells.values(), key=lambda cell: rank[cell.group])


def _fit_of(case: SpeedCase, config: MatrixConfig) -> FitRequest | None:
    """What a sparse row of a model with real weights decodes with: the first of the matrix' estimators and texts."""
    from suite.decoding.shapes import has_weights

    if case.level != "decode" or case.method == "dense" or not has_weights(case.model_shape):
        return None
    text, predictor = config.calibration, config.predictor
    estimator: str = text.estimators[0]
    source, max_tokens, options = text.source, text.max_tokens, None
    if method_class(case.method).needs_predictor:
        estimator, source, max_tokens = predictor.estimators[0], [*predictor.sources, source][0], predictor.max_tokens
        options = next((one for one in predictor.options() if one.predictor == "low-rank"), PredictorOptions())
    return FitRequest(
        model=case.model_shape,
        dtype=case.dtype,
        method=case.method,
        params={},
        sparsity=case.sparsity,
        estimator=estimator,
        calibration=source,
        max_tokens=max_tokens,
        seed=config.seeds[0],
        options=options,
    )


def _timed(case: SpeedCase, config: MatrixConfig, world: World) -> TimedCell:
    device, seed = world.speed_device(case.device), config.seeds[0]
    fit = _fit_of(case, config) if device else None  # where nothing can run, no model need be there
    if fit is not None and fit.options is not None and fit.options.rank is not None:
        case = replace(case, rank=fit.options.rank)
    fit_key = world.fit_key(fit) if fit is not None else None
    return TimedCell(
        case=case,
        seed=seed,
        group=case.group,
        label=f"{case.label} {case.dtype} batch {case.batch_size} threads {case.threads}",
        key_fields={
            "kind": "speed",
            **case.key_fields(),
            "fit": fit_key,
            "seed": seed,
            "device_name": device.name if device else "",
            "driver_version": device.driver if device else "",
            **({"openmp_waiting": world.openmp_waiting()} if case.device == "cpu" else {}),
            "versions": world.versions("speed"),
            "code": world.code("speed", case.method),
        },
        fit=fit,
        fit_key=fit_key,
    )
