"""S-COUNTDOWN: neurons ranked by the saliency of what they add to the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import Activations, Matrix, Method, Quantity, Side

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SCountdown(Method):
    """Score ``0.5 v_i^2 ||W_down[:, i]||^2``: the squared norm of neuron i's share of y (optimal brain damage)."""

    name: ClassVar[str] = "s-countdown"
    source: ClassVar[str] = "reference code of arXiv 2505.17701"
    needs_predictor: ClassVar[bool] = True
    predicted: ClassVar[tuple[Quantity, ...]] = ("act", "up")

    def score(self, activations: Activations) -> Tensor:
        """Saliency in fp32."""
        return 0.5 * activations.product.float().square() * activations.norm2("down", "columns")

    def predicted_weight(self, norm2: Callable[[Matrix, Side], Tensor]) -> Tensor | None:
        """Squared norm of every column of ``W_down``."""
        return norm2("down", "columns")
