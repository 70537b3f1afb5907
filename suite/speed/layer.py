"""One gated MLP with random weights, and what a sparsity means on it; the same on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels_numba.reference import LowRank
from suite.decoding.parts import activate
from suite.methods.base import Calibrated, Factor, kept_count
from suite.modeling.decode import has_kernel
from suite.modeling.gated_logits import gated_logits
from suite.modeling.gated_mlp import activation
from suite.modeling.gathered import Weights, apply_gathered, gathered
from suite.speed.case import Kernel, Progress, Row, SpeedCase, States, phase_row
from suite.speed.rig import Rig

_SAMPLE = 16  # tokens that a layer's moments are taken over
Transpose = Callable[[Tensor], Tensor]
# (name, shape, size of the entries) -> normal numbers on the device, in the dtype of the layer
Draw = Callable[[str, tuple[int, ...], float], Tensor]


def dense_layer(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str) -> Tensor:
    """``y``, shape (batch, d_model), as transformers' own modules compute it."""
    act = activate(functional.linear(x, w_gate), activation)
    return functional.linear(act * functional.linear(x, w_up), w_down)


@dataclass(frozen=True)
class LayerData:
    """Weights of one layer and the input that it is timed with.

    Parameters
    ----------
    w_gate, w_up : Tensor, shape (d_ff, d_model)
    w_down, w_down_t : Tensor, shape (d_model, d_ff), and its transposed copy
    x : Tensor, shape (batch, d_model)
    sample : Tensor, shape (16, d_model)
        Inputs that moments are taken over.
    v, u : Tensor, shape (rank, d_model) and (d_ff, rank), or None
        Of the largest predictor or factor; a smaller one is its first rows and columns.
    wide : dtype that scores are computed in: fp64 where the weights are narrower than fp32. On a CPU, whose weights are
        fp32, fp64 copies of a Llama layer would take 1.4 GB and seconds.
    """

    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    w_down_t: Tensor
    x: Tensor
    sample: Tensor
    v: Tensor | None
    u: Tensor | None
    activation: str
    wide: torch.dtype

    @classmethod
    def random(
        cls, case: SpeedCase, rank: int | None, draw: Draw, transpose: Transpose, wide: torch.dtype
    ) -> LayerData:
        """Weights of size 1/sqrt(inputs), inputs of size 1, as after a norm: speed does not depend on the values."""
        d_model, d_ff = case.d_model, case.d_ff
        down = draw("down", (d_model, d_ff), d_ff**-0.5)
        gate, up = (draw(name, (d_ff, d_model), d_model**-0.5) for name in ("gate", "up"))
        v = None if rank is None else draw("v", (rank, d_model), d_model**-0.5)
        u = None if rank is None else draw("u", (d_ff, rank), rank**-0.5)
        x = draw("x", (case.batch_size, d_model), 1.0)
        sample = draw("sample", (_SAMPLE, d_model), 1.0)
        return cls(gate, up, down, transpose(down), x, sample, v, u, case.activation, wide)

    def dense(self, x: Tensor) -> Tensor:
        """The layer in torch's own kernels."""
        return dense_layer(x, self.w_gate, self.w_up, self.w_down, self.activation)

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``act(g)`` and ``u``, shape (batch, d_ff), wide."""
        x = x.to(self.wide)
        gate, up = (functional.linear(x, weight.to(self.wide)) for weight in (self.w_gate, self.w_up))
        return activate(gate, self.activation), up

    @cached_property
    def own(self) -> tuple[Tensor, Tensor]:
        """`projections` of the layer's own input."""
        return self.projections(self.x)

    @cached_property
    def calibrated(self) -> Calibrated:
        """Mean squares over the sample, as a fit would hold them."""
        act, up = self.projections(self.sample)
        seen = {"input": self.sample, "act": act, "up": up, "product": act * up}
        return Calibrated(moments={name: value.float().square().mean(0) for name, value in seen.items()})

    def _low_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """``v`` and ``u`` of a rank.

        Raises
        ------
        ValueError
            The layer was made without them.
        """
        if self.v is None or self.u is None:
            raise ValueError("the layer was made without a predictor: give it a rank")
        if rank not in self._cut:
            self._cut[rank] = self.v[:rank], self.u[:, :rank].contiguous()
        return self._cut[rank]

    @cached_property
    def _cut(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def known(self, case: SpeedCase) -> Calibrated:
        """What a fit would hold for the case's method; what a factor misses is all of its quantity."""
        method = case.made
        if not method.needs_calibration:
            return Calibrated()
        factors = {}
        for name, rank in method.factors.items():
            v, u = self._low_rank(rank)
            factors[str(name)] = Factor(v.T, u, self.calibrated.moments["act" if name == "gate" else "up"])
        return replace(self.calibrated, factors=factors)

    def _factor(self, case: SpeedCase) -> Factor | None:
        return case.made.low_rank(self.known(case)) if case.kernel is Kernel.THRESHOLD else None

    def low_rank(self, case: SpeedCase) -> LowRank | None:
        """What makes the factors of the neurons in the case's score, token by token; None if nothing does."""
        factor = self._factor(case)
        return None if factor is None else LowRank(factor.v, factor.u, factor.residual)

    def scale(self, case: SpeedCase, x: Tensor) -> Tensor | None:
        """Factor of each neuron in the case's score, (d_ff,), fp32, or of each token's by a low rank, (batch, d_ff), wide."""
        if case.kernel is not Kernel.THRESHOLD:
            return None
        if (factor := self._factor(case)) is None:
            return case.made.neuron_scale(self.known(case))
        return factor.rms(x.to(self.wide), activation(self.activation) if case.first_projection == "up" else None)

    def of_score(self, case: SpeedCase) -> dict[str, Any]:
        """What of a threshold kernel's arguments says how the case scores."""
        found: dict[str, Any] = {"first": case.first_projection}
        if (low := self.low_rank(case)) is not None:
            return found | {"low_rank": low}
        return found | {"scale": self.scale(case, self.x)}

    def predictor(self, case: SpeedCase) -> tuple[Tensor, ...]:
        """``v`` and ``u`` of its low-rank predictor; of a gated one as `gated_logits` takes them, with ``residual``."""
        n = len(case.predicted)
        v, u = self._low_rank((case.rank or 0) * max(n, 1))
        if not n:
            return v, u
        moments = self.calibrated.moments
        residual = torch.stack([moments["act" if name == "gate" else name] for name in case.predicted])
        return v.T, u.view(n, case.d_ff, -1), residual

    def logits(self, case: SpeedCase, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits of the case's predictor, shape (batch, d_ff), in ``dtype``."""
        v, u, *residual = self.predictor(case)
        if residual:
            act = activation(self.activation)
            return gated_logits(x, (v, u, residual[0]), case.predicted, act, dtype)
        return functional.linear(functional.linear(x.to(dtype), v.to(dtype)), u.to(dtype))

    def predictor_bytes(self, case: SpeedCase) -> int:
        """Memory of the case's predictor."""
        return sum(part.numel() * part.element_size() for part in self.predictor(case))

    def magnitudes(self, case: SpeedCase, x: Tensor) -> Tensor:
        """What the case's threshold is set on but for the factor of each neuron, shape (batch, d_ff), wide."""
        if case.kernel is Kernel.PREDICTOR:
            return self.logits(case, x, self.wide)
        act, up = self.own if x is self.x else self.projections(x)
        return (up if case.first_projection == "up" else act).abs()

    def threshold(self, case: SpeedCase) -> float:
        """Half-way between the last score kept and the first dropped, over all tokens of the batch; -inf if all are kept."""
        scores, scale = self.magnitudes(case, self.x).double(), self.scale(case, self.x)
        scores = (scores if scale is None else scores * scale).flatten().sort(descending=True).values
        kept = kept_count(case.d_ff, case.sparsity) * len(self.x)
        return -math.inf if kept == len(scores) else float((scores[kept - 1] + scores[kept]) / 2)

    def gathered(self, case: SpeedCase) -> tuple[Tensor, Weights]:
        """A set of k neurons, which is `given`'s, and the dense matrices of it."""
        listed = self.given(case)
        keep = torch.zeros(1, case.d_ff, dtype=torch.bool, device=listed.device)
        keep[0, listed.long()] = True
        return listed, gathered((self.w_gate, self.w_up, self.w_down), keep)

    def apply_gathered(self, x: Tensor, weights: Weights) -> Tensor:
        """Output of all tokens by what `gathered` gives."""
        return apply_gathered(x, weights, activation(self.activation))

    def given(self, case: SpeedCase) -> Tensor:
        """The k neurons with the largest ``abs(v)`` of the first token, ascending, int32."""
        act, up = self.own
        kept = kept_count(case.d_ff, case.sparsity)
        return (act[0] * up[0]).abs().topk(kept).indices.sort().values.int()


def phase_rows(traces: Sequence[Mapping[str, Tensor]], cycles_per_us: float) -> list[Row]:
    """Rows of schema.PHASES of a traced case: time of each phase over all blocks of all layers.

    Parameters
    ----------
    traces : of each layer, cycles of each block by phase
    """
    rows = []
    for name in traces[0]:
        cycles = torch.cat([trace[name] for trace in traces]).double().cpu().numpy()
        rows.append(phase_row(name, (cycles / cycles_per_us).tolist()))
    return rows


class LayerRig(Rig):
    """Layers with distinct weights, which a device's rig makes."""

    def __init__(self, cases: Sequence[SpeedCase], seed: int, tell: Progress, states: States) -> None:
        super().__init__(cases, seed, tell, states)
        self.layers: list[LayerData] = []
        self._inference = torch.inference_mode()

    def __enter__(self) -> LayerRig:
        self._inference.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._inference.__exit__(None, None, None)

    def _make_layers(
        self, n_layers: int, draw_of: Callable[[int], Draw], transpose: Transpose, wide: torch.dtype
    ) -> None:
        """Fill `layers`; ``draw_of`` gives what draws the matrices of a layer."""
        ranks = [case.rank * max(len(case.predicted), 1) for case in self.cases if case.rank is not None]
        rank = max(ranks, default=None)
        for index in range(n_layers):
            self.tell(f"weights of layer {index}")
            self.layers.append(LayerData.random(self.cases[0], rank, draw_of(index), transpose, wide))


def why_no_kernel(case: SpeedCase) -> str:
    """Reason why no kernel computes the score of the case's method; "" if one does."""
    if case.kernel is Kernel.THRESHOLD and not has_kernel(case.made):
        return f"the kernels do not compute the score of {case.method}: not abs(act(g)) or abs(u), nor times a factor"
    return ""
