"""M-COUNTDOWN with a weight a neuron: abs(W_up x) times what the activated gate is on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import THIS_SUITE, Activations, Calibrated, Method, Projection, Quantity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MCountdownCw(Method):
    """Score ``abs(u) sqrt(E a^2)``: the root of the expected ``v^2`` where u is known and of a its mean square alone.

    The mirror image of CHESS. W_up is computed densely, W_gate and W_down only for the kept neurons.
    """

    name: ClassVar[str] = "m-countdown-cw"
    source: ClassVar[str] = THIS_SUITE
    first_projection: ClassVar[Projection | None] = "up"
    moments: ClassVar[tuple[Quantity, ...]] = ("act",)

    def score(self, activations: Activations) -> Tensor:
        """``abs(u_i)`` times the root mean square of ``a_i`` over calibration tokens, fp32."""
        return activations.up.abs().float() * activations.moments("act").sqrt()

    def neuron_scale(self, calibrated: Calibrated) -> Tensor | None:
        """Root mean square of every ``a_i``."""
        return calibrated.moments["act"].sqrt()
