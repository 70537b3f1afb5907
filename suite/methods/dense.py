"""The dense model: the ceiling of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.errors import InputError
from suite.methods.base import Activations, Method, Mode

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Keeps every neuron."""

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = "the model itself"
    modes: ClassVar[tuple[Mode, ...]] = ("none",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity != 0:
            raise InputError(f"sparsity {self.sparsity} of method dense: dense keeps every neuron; leave it out or 0")

    def score(self, activations: Activations) -> Tensor:
        """All equal."""
        return activations.up.new_zeros(activations.up.shape)
