"""Deja Vu by magnitude: a fairer baseline on gated MLPs than the signed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import THIS_SUITE, Activations, Method, Quantity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DejaVuAbs(Method):
    """Score ``abs(g)``."""

    name: ClassVar[str] = "dejavu-abs"
    source: ClassVar[str] = THIS_SUITE
    needs_predictor: ClassVar[bool] = True
    predicted: ClassVar[tuple[Quantity, ...]] = ("gate",)

    def score(self, activations: Activations) -> Tensor:
        """``abs(g)``."""
        return activations.gate.abs()
