"""One gated MLP with random weights, and what a sparsity means on it; the same on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from suite.decoding.parts import activate
from suite.methods.base import Calibrated, kept_count
from suite.modeling.decode import has_kernel
from suite.registry import get_method
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
        Of a predictor.
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

    def scale(self, case: SpeedCase) -> Tensor | None:
        """Factor of each neuron in the case's score, shape (d_ff,), fp32; None if it has none."""
        if case.kernel is not Kernel.THRESHOLD:
            return None
        method = get_method(case.method)
        return method.neuron_scale(self.calibrated if method.moments else Calibrated())

    @property
    def predictor(self) -> tuple[Tensor, Tensor]:
        """``v`` and ``u``.

        Raises
        ------
        ValueError
            The layer was made without a predictor.
        """
        if self.v is None or self.u is None:
            raise ValueError("the layer was made without a predictor: give it a rank")
        return self.v, self.u

    def logits(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits of the predictor, shape (batch, d_ff), in ``dtype``."""
        v, u = self.predictor
        return functional.linear(functional.linear(x.to(dtype), v.to(dtype)), u.to(dtype))

    def magnitudes(self, case: SpeedCase, x: Tensor) -> Tensor:
        """What the case's threshold is set on but for the factor of each neuron, shape (batch, d_ff), wide."""
        if case.kernel is Kernel.PREDICTOR:
            return self.logits(x, self.wide)
        act, up = self.own if x is self.x else self.projections(x)
        return (up if case.first_projection == "up" else act).abs()

    def threshold(self, case: SpeedCase) -> float:
        """Half-way between the last score kept and the first dropped, over all tokens of the batch; -inf if all are kept."""
        scores, scale = self.magnitudes(case, self.x).double(), self.scale(case)
        scores = (scores if scale is None else scores * scale).flatten().sort(descending=True).values
        kept = kept_count(case.d_ff, case.sparsity) * len(self.x)
        return -math.inf if kept == len(scores) else float((scores[kept - 1] + scores[kept]) / 2)

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
        rank = max((case.rank for case in self.cases if case.rank is not None), default=None)
        for index in range(n_layers):
            self.tell(f"weights of layer {index}")
            self.layers.append(LayerData.random(self.cases[0], rank, draw_of(index), transpose, wide))


def why_no_kernel(case: SpeedCase) -> str:
    """Reason why no kernel computes the score of the case's method; "" if one does."""
    if case.kernel is Kernel.THRESHOLD and not has_kernel(get_method(case.method)):
        return f"the kernels do not compute the score of {case.method}: not abs(act(g)) or abs(u), nor times a factor"
    return ""
