"""Speed cells: cases of ``suite.speed`` with the key of everything that decides their time. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from suite.config import MatrixConfig
from suite.errors import InputError, named
from suite.runs.cells.base import Cell, World
from suite.runs.cells.twins import refuse_twins
from suite.runs.fits import request_of_case
from suite.schema import SPEED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from suite.speed.case import SpeedCase


@dataclass(frozen=True, eq=False, kw_only=True)
class TimedCell(Cell):
    """One speed case on one device; with the fit that a model with real weights decodes with."""

    case: SpeedCase
    seed: int

    kind = "speed"

    @property
    def group(self) -> str:
        """Cells of one group are timed interleaved."""
        return self.case.group

    @property
    def label(self) -> str:
        """One line for progress and messages."""
        case = self.case
        return f"{case.label} {case.dtype} batch {case.batch_size} threads {case.threads}"

    @property
    def params(self) -> Mapping[str, Any]:
        """Fields of its method besides sparsity."""
        return self.case.params

    @property
    def base(self) -> str:
        """Rows of one group stand beside each other."""
        return self.group

    @property
    def columns(self) -> dict[str, Any]:
        """What of its row in speed.csv is known before it is timed."""
        known = {name: value for name, value in self.key_fields.items() if name in SPEED.names}
        return known | {"cell_id": self.id, "sparsity_target": self.case.sparsity}


def expand_speed(config: MatrixConfig, world: World) -> list[TimedCell]:
    """All speed cells of a matrix, those of one group side by side; the first seed makes weights and inputs.

    Raises
    ------
    InputError
        Unknown shape or method, more threads than there are, a case named twice, settings that no column of speed.csv tells
        apart.
    """
    if not config.speed:
        return []
    from suite.speed.expand import PREDICTORS, make_cases

    kinds: list[str] = [kind for kind in PREDICTORS if kind in config.predictor.predictors]
    cells: dict[str, TimedCell] = {}
    for number, block in enumerate(config.speed):
        axes = block.model_dump()
        axes["predictors"] = block.predictors or kinds or PREDICTORS[:1]
        methods = [(method["name"], method["params"]) for method in axes.pop("methods")]
        with named(f"speed.{number}"):
            cases = make_cases(axes.pop("shapes"), methods, axes.pop("sparsities"), **axes)
        for case in cases:
            cell = _timed(case, config, world)
            if cell.key not in cells:
                cells[cell.key] = cell
            elif case.mode != "none":  # the dense case of a group is shared
                raise InputError(f"duplicate cell in speed.{number}: {cell.label}; name each case once")
    refuse_twins(cells.values(), SPEED)
    rank = {group: number for number, group in enumerate(dict.fromkeys(cell.group for cell in cells.values()))}
    return sorted(cells.values(), key=lambda cell: rank[cell.group])


def _timed(case: SpeedCase, config: MatrixConfig, world: World) -> TimedCell:
    device, seed = world.speed_device(case.device), config.seeds[0]
    fit = request_of_case(case, config) if device else None  # where nothing can run, no model need be there
    if fit is not None and fit.options is not None:
        case = replace(case, rank=fit.options.rank_for(case.d_model, max(1, len(case.made.predicted))))
    fit_key = world.fit_key(fit) if fit is not None else None
    return TimedCell(
        case=case,
        model=case.model_shape,
        dtype=case.dtype,
        device=case.device,
        seed=seed,
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
