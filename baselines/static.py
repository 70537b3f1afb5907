"""Static pruning: one set of neurons for all tokens, by the norms of their weights; the floor of what data can add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import THIS_SUITE, Activations, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """Score ``norm(W_gate[i]) norm(W_up[i]) norm(W_down[:, i])``, the same for every token.

    Both modes keep the k neurons of largest score: a smaller dense layer.
    """

    name: ClassVar[str] = "static"
    source: ClassVar[str] = THIS_SUITE
    fixed_set: ClassVar[bool] = True

    def score(self, activations: Activations) -> Tensor:
        """The product of the norms, fp32."""
        norms = [activations.norm2(*of).sqrt() for of in (("gate", "rows"), ("up", "rows"), ("down", "columns"))]
        return (norms[0] * norms[1] * norms[2]).expand(len(activations.documents), -1)
