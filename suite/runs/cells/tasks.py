"""Tasks of cells with the fingerprint of their data. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.errors import InputError, named
from suite.evaluation.tasks import TaskSpec

if TYPE_CHECKING:
    from suite.config import TaskConfig
    from suite.runs.cells.base import World


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
