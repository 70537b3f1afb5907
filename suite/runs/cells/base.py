"""What all cells have in common, and what their keys are made of. Loads no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from suite.runs.store import sha256_of

if TYPE_CHECKING:
    from suite.config import TaskConfig
    from suite.devices import Device
    from suite.evaluation.groups import Group
    from suite.evaluation.tasks import TaskSpec
    from suite.runs.fits import FitRequest

ID_LENGTH = 16  # hex digits of a key that name a cell or a fit in the CSVs: 64 bits


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell(ABC):
    """One thing to measure; equal keys are equal cells.

    Parameters
    ----------
    model, dtype, device : what is loaded for it, if anything: a fit is made on it
    key_fields : everything that decides the number
    fit, fit_key : what must be fitted first
    problem : why it cannot be prepared: it fails with this reason, and nothing is loaded for it
    """

    model: str
    dtype: str
    device: str
    key_fields: Mapping[str, Any]
    fit: FitRequest | None = None
    fit_key: str | None = None
    problem: str = ""

    kind: ClassVar[str]

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that decides the number."""
        return sha256_of(self.key_fields)

    @property
    def id(self) -> str:
        """Name of the cell in the CSVs and the manifest."""
        return self.key[:ID_LENGTH]

    @property
    @abstractmethod
    def label(self) -> str:
        """One line for progress and messages."""

    @property
    def load_group(self) -> tuple[str, str, str]:
        """Cells of one group share one loaded model."""
        return (self.model, self.dtype, self.device)


class World(Protocol):
    """What keys are made of, as this machine has it; the runs' own is ``suite.runs.machine.LocalWorld``."""

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
