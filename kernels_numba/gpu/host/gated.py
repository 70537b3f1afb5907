"""A layer whose neurons a gated predictor chooses, in one launch: low-rank approximations of gate and up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels_numba.gpu.host.checks import check_factors, check_weight
from kernels_numba.gpu.host.layers import ChoosingLayer
from kernels_numba.gpu.mlp.plan import Kind, Quantity
from kernels_numba.reference import Gated, LowRank


class GatedPredictorLayer(ChoosingLayer):
    """Methods with a gated predictor: a neuron is active unless its logit, `Gated.logits`, is below the threshold.

    Parameters as `ThresholdLayer`, and

    gated : Gated
        Matrices in the dtype of the weights, residuals fp32, all on their device; copied, V side by side, and U too with zero
        columns added to each half whose rank is not a multiple of 256 (fp32: 128).

    Notes
    -----
    As in the definition all sums are fp32 sums of products of the stored values, and the root is what is compared: the set
    agrees up to the rounding of the two dot products.

    Raises
    ------
    ValueError
        As `ThresholdLayer`, and a predictor without a part or with one of another shape, dtype or device.
    """

    kind: Kind = "predictor"

    def __init__(
        self, w_gate: Tensor, w_up: Tensor, w_down_t: Tensor, gated: Gated, *, activation: str, threshold: float
    ) -> None:
        gate: Quantity = "act" if gated.act else "gate"
        named: tuple[tuple[Quantity, LowRank | None], ...] = ((gate, gated.gate), ("up", gated.up))
        parts = [(name, part) for name, part in named if part is not None]
        if not parts:
            raise ValueError("gated has neither gate nor up: give it at least one")
        for name, part in parts:
            if not isinstance(part.v, Tensor) or part.v.dim() != 2 or not part.v.shape[1]:
                raise ValueError(f"v of {name} must be a matrix (d_model, rank) with at least one column")
        predicted = tuple((name, int(part.v.shape[1])) for name, part in parts)
        super().__init__(w_down_t, activation, threshold, rank=sum(r for _, r in predicted), predicted=predicted)
        for matrix, weight in (("w_gate", w_gate), ("w_up", w_up)):
            check_weight(matrix, weight, (self.d_ff, self.d_model), w_down_t)
        for name, part in parts:
            rank = part.v.shape[1]
            check_weight(f"v of {name}", part.v.contiguous(), (self.d_model, rank), w_down_t)
            check_weight(f"u of {name}", part.u, (self.d_ff, rank), w_down_t)
            check_factors(f"residual of {name}", part.residual, self.d_ff, self.device)
        widths = [padded for _, padded in self._plan(1).parts]
        v = torch.cat([part.v for _, part in parts], 1).T.contiguous()
        padded = zip(parts, widths, strict=True)
        u = torch.cat([pad(part.u, (0, width - part.u.shape[1])) for (_, part), width in padded], 1)
        residuals = torch.stack([part.residual for _, part in parts])
        self._weights, self._predictor = (w_gate, w_up), (v, u, residuals)
        tensors = {"dense": v, "u": u, "values": residuals, "a": w_gate, "b": w_up}
        self._addresses |= {name: tensor.data_ptr() for name, tensor in tensors.items()}

    @property
    def extra_bytes(self) -> int:
        """As for all layers, and the predictor."""
        return super().extra_bytes + sum(one.numel() * one.element_size() for one in self._predictor)

    def __call__(self, x: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
        """``y`` (plus ``residual``), of the shape and dtype of ``x`` (..., d_model), at most 8 tokens."""
        return self._run(x, out, residual)
