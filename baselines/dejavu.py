"""Deja Vu as COUNTDOWN's reference code re-defines it for gated MLPs: neurons ranked by signed W_gate x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import Activations, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DejaVu(Method):
    """Score ``g``, signed (Liu et al. 2023 rank ReLU units); large negative g, which SiLU does not map to 0, is lost."""

    name: ClassVar[str] = "dejavu"
    source: ClassVar[str] = "Liu et al. 2023, arXiv 2310.17157"
    needs_predictor: ClassVar[bool] = True

    def score(self, activations: Activations) -> Tensor:
        """``g``."""
        return activations.gate
