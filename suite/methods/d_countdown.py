"""D-COUNTDOWN: neurons ranked by the direct coefficient abs(act(g) * u)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import Activations, Method, Quantity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DCountdown(Method):
    """Score ``abs(v)``, the coefficient of W_down's column; found ahead of time by a predictor (arXiv 2505.17701)."""

    name: ClassVar[str] = "d-countdown"
    source: ClassVar[str] = "arXiv 2505.17701"
    needs_predictor: ClassVar[bool] = True
    predicted: ClassVar[tuple[Quantity, ...]] = ("act", "up")

    def score(self, activations: Activations) -> Tensor:
        """``abs(v)``, the product rounded to the model's dtype as the model itself rounds it."""
        return activations.product.abs()
