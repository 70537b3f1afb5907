"""Speed cells: cases of ``suite.speed`` with the key of everything that decides their time. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from suite.config import MatrixConfig
from suite.errors import InputError
from suite.runs.cells import World
from suite.runs.store import sha256_of

if TYPE_CHECKING:
    from suite.speed.cases import SpeedCase

ID_LENGTH = 16


@dataclass(frozen=True, eq=False)
class TimedCell:
    """One speed case on one device."""

    case: SpeedCase
    seed: int
    group: str
    label: str
    key_fields: Mapping[str, Any]

    kind = "speed"

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
            cell = _timed(case, config.seeds[0], world)
            if cell.key not in cells:
                cells[cell.key] = cell
            elif case.method != "dense":  # the dense case of a group is shared
                raise InputError(f"duplicate cell in speed.{number}: {cell.label}; name each case once")
    rank = {group: number for number, group in enumerate(dict.fromkeys(cell.group for cell in cells.values()))}
    return sorted(cells.values(), key=lambda cell: rank[cell.group])


def _timed(case: SpeedCase, seed: int, world: World) -> TimedCell:
    device = world.speed_device(case.device)
    return TimedCell(
        case=case,
        seed=seed,
        group=case.group,
        label=f"{case.label} {case.dtype} batch {case.batch_size} threads {case.threads}",
        key_fields={
            "kind": "speed",
            **case.key_fields(),
            "seed": seed,
            "device_name": device.name if device else "",
            "driver_version": device.driver if device else "",
            "versions": world.versions("speed"),
            "code": world.code("speed", case.method),
        },
    )
