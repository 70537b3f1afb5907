"""What `suite.speed.bench` asks of a level and a device: a rig of what the cases of a group share, and a subject a case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from suite.speed.case import Check, Progress, Row, SpeedCase, States
from suite.speed.clock import ReadBandwidth, Rounds


class Subject(ABC):
    """One case, ready to be checked; after a passed check and `prepare`, ready to be timed."""

    rounds: ClassVar[Rounds]

    def __init__(self, case: SpeedCase) -> None:
        self.case = case

    @abstractmethod
    def check(self) -> Check:
        """Hold what it computes against the definition."""

    @abstractmethod
    def prepare(self) -> None:
        """Make what only running needs, such as graphs; counts the neurons that are used."""

    @abstractmethod
    def run(self) -> None:
        """Run once: a pass over all layers, or a token."""

    @abstractmethod
    def sample(self, bandwidth: ReadBandwidth | None) -> list[float]:
        """Seconds of a layer or a token in one round, with caches that hold nothing of the case."""

    @property
    def needed_bytes(self) -> float | None:
        """What a layer or a token has to read; None if the time is not held against the bandwidth."""
        return None

    def facts(self, seconds: float) -> Row:
        """Columns that are known once it was timed.

        Parameters
        ----------
        seconds : median
        """
        return {}


class Rig(ABC):
    """What the cases of one group share, such as weights; a context within which they are checked and timed.

    Parameters
    ----------
    cases : those that `why_not` has nothing against
    seed : of weights and inputs
    tell : gets lines of progress
    states : fits of decode cases of a model with real weights
    """

    def __init__(self, cases: Sequence[SpeedCase], seed: int, tell: Progress, states: States) -> None:
        self.cases, self.seed, self.tell, self.states = list(cases), seed, tell, states

    @staticmethod
    @abstractmethod
    def why_not(case: SpeedCase) -> str:
        """Reason why a case cannot run here; "" if it can."""

    @staticmethod
    def no_room(cases: Sequence[SpeedCase]) -> str:
        """Reason why the group does not fit into memory; "" if it does."""
        return ""

    @abstractmethod
    def __enter__(self) -> Rig: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    def batches(self) -> Iterator[Sequence[SpeedCase]]:
        """Cases that are timed interleaved; all of them, unless they cannot be ready at the same time."""
        yield self.cases

    @abstractmethod
    def subject(self, case: SpeedCase) -> Subject:
        """The case on this rig. It is checked and prepared before the next one is asked for."""

    @abstractmethod
    def bandwidth(self) -> ReadBandwidth:
        """A fresh one of the group's device and threads."""
