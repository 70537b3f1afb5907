"""Groups of lm-eval in a matrix: the cells of their tasks, one setting at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from suite.config import MatrixConfig
from suite.evaluation.groups import Group
from suite.runs.cells.accuracy import AccuracyCell
from suite.runs.cells.base import World
from suite.runs.cells.tasks import prepare_task
from suite.runs.store import canonical


@dataclass(frozen=True)
class GroupCells:
    """The cells of a group's tasks under one setting, and those of dense on the same tasks."""

    group: Group
    cells: tuple[AccuracyCell, ...]
    dense: tuple[AccuracyCell, ...]


def group_cells(config: MatrixConfig, world: World, cells: Sequence[AccuracyCell]) -> list[GroupCells]:
    """Every group that a matrix names and that averages something, under every setting that all of its tasks have."""
    found: dict[str, GroupCells] = {}
    by_task: dict[str, list[AccuracyCell]] = {}
    for cell in cells:
        by_task.setdefault(canonical(cell.key_fields["task"]), []).append(cell)
    for block in config.accuracy:
        for task in block.tasks:
            members = world.members([task])
            for group in world.groups(task):
                configs = [one for one in members if one.name in group.tasks]
                if not group.weightings or len(configs) != len(group.tasks):  # a task with two numbers of examples
                    continue
                prepared = [prepare_task(one, world, "") for one in configs]
                of_tasks = [by_task.get(canonical(one.key_task), []) for one in prepared]
                for made in _by_setting(group, of_tasks):
                    found.setdefault(canonical([group.name, *(cell.key for cell in made.cells)]), made)
    return list(found.values())


def _by_setting(group: Group, of_tasks: Sequence[Sequence[AccuracyCell]]) -> Iterator[GroupCells]:
    tables = [{_setting(cell): cell for cell in cells} for cells in of_tasks]
    for setting in tables[0]:
        if all(setting in table for table in tables):
            cells = tuple(table[setting] for table in tables)
            dense = tuple(
                next((one for one in own if one.mode == "none" and one.base == cell.base), cell)
                for own, cell in zip(of_tasks, cells, strict=True)
            )
            yield GroupCells(group, cells, dense)


def _setting(cell: AccuracyCell) -> str:
    names = ("weights", "dtype", "method", "params", "mode", "sparsity", "fit", "scope", "batch_size", "seed", "device")
    return canonical([cell.key_fields[name] for name in names])
