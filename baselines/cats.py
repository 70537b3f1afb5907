"""CATS: neurons ranked by abs(act(W_gate x)) (Lee et al. 2024, arXiv 2404.08763)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from suite.methods.base import Activations, Method, Projection


@dataclass(frozen=True, kw_only=True)
class Cats(Method):
    """Score ``abs(a)``; W_gate is computed densely, W_up and W_down only for the kept neurons."""

    name: ClassVar[str] = "cats"
    first_projection: ClassVar[Projection | None] = "gate"

    def score(self, activations: Activations) -> Tensor:
        """``abs(act(g))``."""
        return activations.act.abs()
