"""Deja Vu by magnitude: a fairer baseline on gated MLPs than the signed one."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from suite.methods.base import Activations, Method


@dataclass(frozen=True, kw_only=True)
class DejaVuAbs(Method):
    """Score ``abs(g)``."""

    name: ClassVar[str] = "dejavu-abs"
    needs_predictor: ClassVar[bool] = True

    def score(self, activations: Activations) -> Tensor:
        """``abs(g)``."""
        return activations.gate.abs()
