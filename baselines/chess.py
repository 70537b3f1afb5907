"""CHESS: neurons ranked by abs(act(W_gate x)) with a threshold of its own for each (He et al. 2024, arXiv 2409.01366)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import Activations, Calibrated, Method, Projection, Quantity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Chess(Method):
    """Score ``abs(a) sqrt(E u^2)``; W_gate is computed densely, W_up and W_down only for the kept neurons.

    A threshold on it is one a channel on ``abs(a)``, as in the paper; the paper takes the mean of ``abs(u)``, here it is
    the root mean square, with which the score is the root of the expected ``v^2``.
    """

    name: ClassVar[str] = "chess"
    source: ClassVar[str] = "He et al. 2024, arXiv 2409.01366"
    first_projection: ClassVar[Projection | None] = "gate"
    moments: ClassVar[tuple[Quantity, ...]] = ("up",)

    def score(self, activations: Activations) -> Tensor:
        """``abs(a_i)`` times the root mean square of ``u_i`` over calibration tokens, fp32."""
        return activations.act.abs().float() * activations.moments("up").sqrt()

    def neuron_scale(self, calibrated: Calibrated) -> Tensor | None:
        """Root mean square of every ``u_i``."""
        return calibrated.moments["up"].sqrt()
