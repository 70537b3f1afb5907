"""M-COUNTDOWN: neurons ranked by the indirect coefficient abs(W_up x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import Activations, Method, Projection

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MCountdown(Method):
    """Score ``abs(u)``; W_up is computed densely, W_gate and W_down only for the kept neurons (arXiv 2505.17701)."""

    name: ClassVar[str] = "m-countdown"
    source: ClassVar[str] = "arXiv 2505.17701"
    first_projection: ClassVar[Projection | None] = "up"

    def score(self, activations: Activations) -> Tensor:
        """``abs(u)``."""
        return activations.up.abs()
