"""A sparse method in the decode steps of a model: what it scores, its thresholds, its kernels, and its definition.

A model with real weights takes its thresholds and predictors from fits. Of random weights thresholds are set on the decode
steps themselves, so that the realised sparsity is the target, as are the moments that a score asks for, and a predictor
has random matrices: its cost is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from suite.decoding.step import DecodeModel
from suite.errors import InputError
from suite.methods.base import Activations, Calibrated, PredictorInput, kept_count, select_threshold
from suite.modeling.decode import ChoosingKernels, DecodeKernels
from suite.modeling.decode_layers import decode_kernels
from suite.modeling.modes import (
    PredictorState,
    ThresholdState,
    checked_thresholds,
    placed_calibration,
    placed_predictor,
)
from suite.registry import get_method

_CALIBRATION_STEPS = 12
Choose = Callable[[Activations], Tensor]  # activations of one token -> set, bool (1, d_ff)


@dataclass(frozen=True)
class RandomPredictor:
    """Low-rank matrices of every layer with random entries: v (d_model, rank), u (d_ff, rank)."""

    v: tuple[Tensor, ...]
    u: tuple[Tensor, ...]
    predictor_input: ClassVar[PredictorInput] = "mlp"

    @classmethod
    def make(cls, decode: DecodeModel, rank: int, seed: int) -> RandomPredictor:
        """Entries of size 1/sqrt(inputs), in the model's dtype and on its device."""
        generator = torch.Generator(device=decode.device).manual_seed(seed)

        def normal(rows: int, columns: int, inputs: int) -> Tensor:
            values = torch.randn(rows, columns, device=decode.device, generator=generator) * inputs**-0.5
            return values.to(decode.dtype)

        mlp = decode.mlps[0]
        v = tuple(normal(mlp.d_model, rank, mlp.d_model) for _ in decode.mlps)
        return cls(v, tuple(normal(mlp.d_ff, rank, rank) for _ in decode.mlps))

    def logits(self, layer: int, x: Tensor) -> Tensor:
        """``(x V) U^T``, fp32, shape (n_tokens, d_ff)."""
        return x.float() @ self.v[layer].float() @ self.u[layer].float().T


class MaskedMlp:
    """The definition: every product dense, entries of v outside the chosen set 0."""

    def __init__(self, decode: DecodeModel, choose: Choose) -> None:
        self._decode, self._choose = decode, choose

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """The MLP's output, (1, d_model)."""
        mlp = self._decode.mlps[layer]
        activations = mlp.activations(x)
        return mlp.down(activations.product * self._choose(activations))


class SparseMethod:
    """A sparse method of a model.

    Parameters
    ----------
    decode : DecodeModel
    name : registry name or ``module:Class``
    rank, seed : of a predictor with random matrices; thresholds are then set by `calibrate`
    state : fit of the practical mode, instead of both
    """

    def __init__(
        self,
        decode: DecodeModel,
        name: str,
        rank: int | None = None,
        seed: int = 0,
        state: ThresholdState | None = None,
    ) -> None:
        self.decode, self.method = decode, get_method(name, sparsity=0.0 if state is None else state.sparsity)
        self.predictor: Any = None
        self.calibrated: list[Calibrated] | None = None
        self.thresholds = torch.full((len(decode.mlps),), -math.inf)
        self._kernels: DecodeKernels | None = None
        if state is not None:
            self.thresholds = checked_thresholds(decode.model, self.method, state)
            if self.method.needs_calibration:
                self.calibrated = placed_calibration(decode.model, self.method, state)
            if isinstance(state, PredictorState):
                self.predictor = placed_predictor(decode.model, state)
                if self.predictor.predictor_input != "mlp":
                    raise InputError(
                        f"predictor of {name} reads the block's input: decode steps hand on the MLP's alone"
                    )
        elif rank is not None:
            self.predictor = RandomPredictor.make(decode, rank, seed)

    def score(self, activations: Activations) -> Tensor:
        """What the threshold is set on, fp32, (1, d_ff): the predictor's logits, or the method's own score."""
        if self.predictor is not None:
            logits: Tensor = self.predictor.logits(activations.site.layer, activations.input)
            return logits
        if self.calibrated is not None:
            activations = replace(activations, calibrated=self.calibrated[activations.site.layer])
        return self.method.score(activations).float()

    def _measure(self, start: tuple[int, int]) -> list[Calibrated]:
        """Mean squares that the score asks for, of the tokens of some dense decode steps."""
        sums: list[dict[str, Tensor]] = [{} for _ in self.decode.mlps]

        def choose(activations: Activations) -> Tensor:
            layer = sums[activations.site.layer]
            for name in self.method.moments:
                part = getattr(activations, name)[0].float().square() / _CALIBRATION_STEPS
                layer[name] = layer[name] + part if name in layer else part
            return torch.ones_like(activations.product, dtype=torch.bool)

        self._follow(choose, start)
        return [Calibrated(moments=layer) for layer in sums]

    def _follow(self, choose: Choose, start: tuple[int, int]) -> None:
        mlp = MaskedMlp(self.decode, choose)
        self.decode.rewind(*start)
        for _ in range(_CALIBRATION_STEPS):
            self.decode.step(mlp)

    def calibrate(self, sparsity: float, start: tuple[int, int]) -> None:
        """Thresholds that keep the target on decode steps with every layer sparse: the median kth score of some tokens."""
        if self.method.moments and self.calibrated is None:
            self.calibrated = self._measure(start)
        seen: list[list[float]] = [[] for _ in self.decode.mlps]

        def choose(activations: Activations) -> Tensor:
            score, thresholds = self.score(activations), seen[activations.site.layer]
            k = kept_count(score.shape[-1], sparsity)
            top = score.topk(min(k + 1, score.shape[-1]), dim=-1).values[0]
            thresholds.append(float(top[k - 1 :].mean()) if len(top) > k else -math.inf)
            return score >= thresholds[-1]

        self._follow(choose, start)
        self.thresholds = torch.tensor([float(np.median(values)) for values in seen])

    def choose(self, activations: Activations) -> Tensor:
        """The method's own set."""
        return select_threshold(self.score(activations), float(self.thresholds[activations.site.layer]))

    def kernels(self) -> DecodeKernels:
        """Kernels with the thresholds as they are now; on a GPU they hold one copy of W_down for all sparsities."""
        if isinstance(self._kernels, ChoosingKernels):
            for layer, threshold in zip(self._kernels.layers, self.thresholds.tolist(), strict=True):
                layer.threshold = threshold
        else:
            self._kernels = decode_kernels(
                self.decode.model, self.method, self.thresholds, self.predictor, calibrated=self.calibrated
            )
        return self._kernels

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the dense model's: transposed copies of W_down, the predictor, and what the score asks of a fit."""
        extra = [mlp.weights()[2] for mlp in self.decode.mlps]
        if self.predictor is not None:
            extra += [*self.predictor.v, *self.predictor.u]
        for known in self.calibrated or ():
            extra += known.moments.values()
        return sum(matrix.numel() * matrix.element_size() for matrix in extra)
