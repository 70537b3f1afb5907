"""CATS: neurons ranked by abs(act(W_gate x)) (Lee et al. 2024, arXiv 2404.08763)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import Activations, Method, Projection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Cats(Method):
    """Score ``abs(a)``; W_gate is computed densely, W_up and W_down only for the kept neurons."""

    name: ClassVar[str] = "cats"
    source: ClassVar[str] = "Lee et al. 2024, arXiv 2404.08763"
    first_projection: ClassVar[Projection | None] = "gate"

    def score(self, activations: Activations) -> Tensor:
        """``abs(act(g))``."""
        return activations.act.abs()
