"""Methods as a user would write them outside the project, named as module:Class."""

from dataclasses import dataclass
from typing import ClassVar

from suite.methods.base import Method, Projection


@dataclass(frozen=True, kw_only=True)
class MagnitudeOfGate(Method):
    """The magnitude of the activated gate under another name: what the threshold kernels compute."""

    name: ClassVar[str] = "magnitude-of-gate"
    first_projection: ClassVar[Projection | None] = "gate"

    def score(self, activations):
        return activations.act.abs()


@dataclass(frozen=True, kw_only=True)
class Predicted(Method):
    """A score of its own, which a predictor stands in for."""

    name: ClassVar[str] = "predicted"
    needs_predictor: ClassVar[bool] = True

    def score(self, activations):
        return activations.up**2


@dataclass(frozen=True, kw_only=True)
class Unkerneled(Method):
    """Ranks by a score that neither a projection nor a predictor gives."""

    name: ClassVar[str] = "unkerneled"

    def score(self, activations):
        return activations.product.abs()
