"""Methods whose set is known before a token is computed: dense layers of the kept neurons, gathered once, in plain torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from suite.modeling.gated_mlp import GatedMLP

Weights = tuple[Tensor, Tensor]


class GatheredLayers:
    """Rows of ``W_gate`` and ``W_up`` and columns of ``W_down`` of the kept neurons, side by side as dense matrices.

    They serve any device and dtype, and any number of tokens where these share a set.

    Parameters
    ----------
    sparsity : float, optional
        Of sets that every row has of its own. No more rows than 1 / (1 - sparsity) then: their copies would take more memory
        than the dense layers, and a step would read more.
    """

    def __init__(self, mlps: Sequence[GatedMLP], sparsity: float | None = None) -> None:
        self._mlps = mlps
        self.most = sys.maxsize if sparsity is None else int(1 / (1 - sparsity) + 1e-9)
        self._keep: dict[int, Tensor] = {}
        self._weights: dict[int, Weights] = {}

    def gather(self, layer: int, keep: Tensor) -> None:
        """Fix the sets of a layer, and copy their weights; into the memory of the sets before, where it has the size.

        Parameters
        ----------
        keep : Tensor, shape (n_rows, d_ff), bool
            One set for all tokens, or one for each row of a batch; waits for the device.
        """
        found = gathered(self._mlps[layer].weights(), keep)
        before = self._weights.get(layer)
        if before is not None and before[0].shape == found[0].shape:
            for old, new in zip(before, found, strict=True):
                old.copy_(new)
        else:
            self._weights[layer] = found
        self._keep[layer] = keep

    def run(self, layer: int, x: Tensor, block: Tensor | None = None) -> Tensor:
        """The MLP's output, shape and dtype of x (..., d_model)."""
        return apply_gathered(x, self._weights[layer], self._mlps[layer].act)

    def kept(self, layers: Sequence[int], n_tokens: int) -> Tensor:
        """Neurons used for each token, shape (len(layers), n_tokens), int64."""
        return torch.stack([self._keep[layer].sum(-1).expand(n_tokens) for layer in layers])

    def active(self, layer: int) -> Tensor:
        """Neurons used for the first token, ascending, int64; waits."""
        return self._keep[layer][0].nonzero()[:, 0]

    @property
    def extra_bytes(self) -> int:
        """Memory of the copies."""
        return sum(weight.numel() * weight.element_size() for pair in self._weights.values() for weight in pair)


def gathered(weights: tuple[Tensor, Tensor, Tensor], keep: Tensor) -> Weights:
    """Dense matrices of the kept neurons of each row: gate above up, (n_rows, 2k, d_model), and down, (n_rows, d_model, k).

    k is the size of the largest set; rows with fewer neurons fill up with zeros of gate and up, which add nothing.
    """
    gate, up, down = (weight.detach() for weight in weights)
    k = int(keep.sum(-1).max())
    order = keep.int().argsort(dim=-1, descending=True, stable=True)[:, :k]
    real = keep.gather(1, order)
    first = [weight[order].masked_fill_(~real[:, :, None], 0) for weight in (gate, up)]
    return torch.cat(first, 1), down[:, order].transpose(0, 1).contiguous()


def apply_gathered(x: Tensor, weights: Weights, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Output of x (..., d_model) by what `gathered` gives: of one row for all tokens, else token i by row i."""
    first, down = weights
    if len(first) == 1:
        gate, up = functional.linear(x, first[0]).chunk(2, dim=-1)
        return functional.linear(act(gate) * up, down[0])
    gate, up = torch.bmm(first, x.reshape(len(first), -1, 1)).chunk(2, dim=1)
    return torch.bmm(down, act(gate) * up).view(x.shape)
