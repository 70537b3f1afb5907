"""Random neurons: the floor of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from suite.methods.base import THIS_SUITE, Activations, Method, Mode

if TYPE_CHECKING:
    from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX_1, _MIX_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele et al. 2014) on int64 with wrap-around: a bijection that looks random."""
    x = (x ^ _logical_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_shift(x, 27)) * _MIX_2
    return x ^ _logical_shift(x, 31)


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Uniform noise, keyed by (seed, layer, document, position, neuron): the same whatever the batch or the device."""

    seed: int = 0

    name: ClassVar[str] = "random"
    source: ClassVar[str] = THIS_SUITE
    modes: ClassVar[tuple[Mode, ...]] = ("ideal",)

    def score(self, activations: Activations) -> Tensor:
        """Uniform in [0, 1) with 24 bits, shape (n_tokens, d_ff), fp32."""
        import torch  # late: listing the methods must not load it

        up = activations.up
        start = torch.tensor(_signed((self.seed * 0x9E3779B97F4A7C15) & (1 << 64) - 1), device=up.device)
        token = _mix(start + activations.site.layer)
        for key in (activations.documents, activations.positions):
            token = _mix((token ^ key.to(up.device)) + _GOLDEN)
        neuron = torch.arange(1, up.shape[-1] + 1, device=up.device) * _GOLDEN
        return _logical_shift(_mix(token[:, None] + neuron), 40).float() / (1 << 24)
