"""Methods as a user would write them outside the project; named as module:Class they get every contract test."""

from dataclasses import dataclass
from typing import ClassVar

from suite.methods.base import Method, Projection


@dataclass(frozen=True, kw_only=True)
class PowerOfUp(Method):
    """A score of its own on the up projection, with a parameter of its own."""

    power: float = 2.0

    name: ClassVar[str] = "power-of-up"
    first_projection: ClassVar[Projection | None] = "up"

    def score(self, activations):
        return activations.up.abs() ** self.power


@dataclass(frozen=True, kw_only=True)
class SquareOfGate(Method):
    """A score that a trained predictor tells beforehand."""

    name: ClassVar[str] = "square-of-gate"
    needs_predictor: ClassVar[bool] = True

    def score(self, activations):
        return activations.gate.float().square()


class NoMethod:
    """Lacks the contract."""
