"""Analysis cells: one per model, with the key of everything that decides what ``suite.analysis`` finds. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.config import AnalysisConfig, MatrixConfig, ModelConfig, TaskConfig
from suite.errors import InputError
from suite.evaluation.tasks import DECODE_PERPLEXITY
from suite.runs.cells.base import Cell, World
from suite.runs.cells.tasks import PreparedTask, prepare_task

if TYPE_CHECKING:
    from suite.evaluation.tasks import TaskSpec


@dataclass(frozen=True, eq=False, kw_only=True)
class AnalysisCell(Cell):
    """The coefficients of one model's generated tokens."""

    model_name: str
    task: TaskSpec
    config: AnalysisConfig

    kind = "analysis"

    @property
    def label(self) -> str:
        """One line for progress and messages."""
        return f"{self.model_name} analysis of {self.config.documents * self.config.new_tokens} generated tokens"

    @property
    def base(self) -> tuple[object, ...]:
        """A task of its own beside those of the accuracy cells."""
        return (*self.load_group, self.kind)


def expand_analysis(config: MatrixConfig, world: World) -> list[AnalysisCell]:
    """Analysis cells of a matrix, one per model; none without an ``analysis`` section.

    Raises
    ------
    InputError
        The text is not one of decode_perplexity.
    """
    if config.analysis is None:
        return []
    if not config.analysis.text.startswith(DECODE_PERPLEXITY):
        raise InputError(f"analysis.text {config.analysis.text!r}: must be {DECODE_PERPLEXITY} or one of its texts")
    wanted = TaskConfig(name=config.analysis.text, limit=config.analysis.documents)
    task = prepare_task(wanted, world, "analysis.text")
    return [_cell(config.analysis, model, task, world) for model in config.models]


def _cell(analysis: AnalysisConfig, model: ModelConfig, prepared: PreparedTask, world: World) -> AnalysisCell:
    task = prepared.spec
    return AnalysisCell(
        model=model.id,
        model_name=world.model_name(model.id),
        dtype=model.dtype,
        device=world.device.type,
        task=task,
        config=analysis,
        key_fields={
            "kind": "analysis",
            "weights": world.weights(model.id),
            "dtype": model.dtype,
            **analysis.model_dump(),
            "task": {"name": task.name, "options": dict(task.options), "data": prepared.data},
            "device": world.device.type,
            "versions": world.versions("accuracy"),
            "code": world.code("analysis", ""),
        },
        problem=prepared.problem,
    )
