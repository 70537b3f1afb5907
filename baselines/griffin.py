"""GRIFFIN: one set of neurons a prompt, those that were largest over its tokens (Dong et al. 2024, arXiv 2404.01365)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import Activations, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Griffin(Method):
    """Score ``sqrt(sum over the prompt's tokens of (v_i / norm(v))^2)``, the same for every token that follows the prompt.

    Both modes keep the k neurons of largest score, for each row of a batch its own: a dense layer of k neurons, gathered
    once a prompt. A token without a prompt stays dense.
    """

    name: ClassVar[str] = "griffin"
    source: ClassVar[str] = "Dong et al. 2024, arXiv 2404.01365"
    fixed_set: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True

    def score(self, activations: Activations) -> Tensor:
        """Root of `Activations.prompt`, fp32."""
        return activations.prompt.sqrt()
