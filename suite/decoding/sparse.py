"""A sparse method in the decode steps of a model: what it scores, its thresholds, its kernels, and its definition.

A model with real weights takes its thresholds and predictors from fits. Of random weights thresholds are set on the decode
steps themselves, so that the realised sparsity is the target, as are the moments that a score asks for; predictors and
factors of a low rank have random matrices: their cost is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suite.decoding.step import DecodeModel
from suite.errors import InputError
from suite.methods.base import (
    Activations,
    Calibrated,
    Factor,
    PredictorInput,
    Quantity,
    kept_count,
    select_threshold,
    select_top_k,
)
from suite.modeling.decode import ChoosingKernels, DecodeKernels, PromptKernels
from suite.modeling.decode_layers import decode_kernels
from suite.modeling.gated_logits import gated_logits
from suite.modeling.gated_mlp import GatedMLP, activation
from suite.modeling.gathered import GatheredLayers
from suite.modeling.layer import shares_of_norm
from suite.modeling.modes import (
    PredictorState,
    ThresholdState,
    checked_thresholds,
    placed_calibration,
    placed_predictor,
    settled,
)
from suite.registry import get_method

_CALIBRATION_STEPS = 12
Choose = Callable[[Activations], Tensor]  # activations of one token -> set, bool (1, d_ff)


class _Random:
    """Matrices with random entries of size 1/sqrt(inputs), in a model's dtype and on its device."""

    def __init__(self, decode: DecodeModel, seed: int) -> None:
        self._generator = torch.Generator(device=decode.device).manual_seed(seed)
        self._decode, self._mlp = decode, decode.mlps[0]

    def normal(self, *shape: int, inputs: int) -> Tensor:
        values = torch.randn(*shape, device=self._decode.device, generator=self._generator) * inputs**-0.5
        return values.to(self._decode.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Between 0 and 1, fp32."""
        return torch.rand(*shape, device=self._decode.device, generator=self._generator)

    def factor(self, rank: int) -> Factor:
        d_model, d_ff = self._mlp.d_model, self._mlp.d_ff
        v, u = self.normal(d_model, rank, inputs=d_model), self.normal(d_ff, rank, inputs=rank)
        return Factor(v, u, self.uniform(d_ff))


@dataclass(frozen=True)
class RandomPredictor:
    """Matrices of every layer with random entries, low-rank or gated: fields as of a fitted predictor."""

    v: tuple[Tensor, ...]
    u: tuple[Tensor, ...]
    residual: tuple[Tensor, ...] = ()
    predicted: tuple[Quantity, ...] = ()
    activation: str = ""
    predictor_input: PredictorInput = "mlp"

    @classmethod
    def make(
        cls,
        decode: DecodeModel,
        rank: int,
        seed: int,
        predicted: Sequence[Quantity] = (),
        predictor_input: PredictorInput = "mlp",
    ) -> RandomPredictor:
        """Low-rank; gated where it is told what it approximates, each of the rank."""
        random, mlp, n = _Random(decode, seed), decode.mlps[0], len(predicted)
        v = tuple(random.normal(mlp.d_model, max(n, 1) * rank, inputs=mlp.d_model) for _ in decode.mlps)
        if not n:
            return cls(v, tuple(random.normal(mlp.d_ff, rank, inputs=rank) for _ in decode.mlps))
        u = tuple(random.normal(n, mlp.d_ff, rank, inputs=rank) for _ in decode.mlps)
        residual = tuple(random.uniform(n, mlp.d_ff) for _ in decode.mlps)
        return cls(v, u, residual, tuple(predicted), mlp.activation, predictor_input)

    def logits(self, layer: int, x: Tensor) -> Tensor:
        """``(x V) U^T``, or what a gated one says; fp32, shape (n_tokens, d_ff)."""
        if self.predicted:
            matrices = self.v[layer], self.u[layer], self.residual[layer]
            return gated_logits(x, matrices, self.predicted, activation(self.activation))
        return x.float() @ self.v[layer].float() @ self.u[layer].float().T


class MaskedMlp:
    """The definition: every product dense, entries of v outside the chosen set 0."""

    def __init__(self, decode: DecodeModel, choose: Choose) -> None:
        self._decode, self._choose = decode, choose

    def __call__(self, layer: int, x: Tensor, block: Tensor) -> Tensor:
        """The MLP's output, (1, d_model)."""
        mlp = self._decode.mlps[layer]
        activations = mlp.activations(x, block=block)
        return mlp.down(activations.product * self._choose(activations))


class SparseMethod:
    """A sparse method of a model.

    Parameters
    ----------
    decode : DecodeModel
    name : registry name or ``module:Class``
    rank, seed : of a predictor with random matrices; thresholds are then set by `calibrate`
    state : fit of the practical mode, instead of both
    params : of the method, without its sparsity
    gated : whether the predictor with random matrices is a gated one; ``predictor_input`` is then what it reads
    prompt : Tensor, shape (1, n_tokens), int64
        What the steps follow, of which a method with `Method.needs_prompt` takes its set.

    Raises
    ------
    InputError
        A fit of another method or model; a parameter that only a fit chooses, without one; no prompt where one is needed.
    """

    def __init__(
        self,
        decode: DecodeModel,
        name: str,
        rank: int | None = None,
        seed: int = 0,
        state: ThresholdState | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        gated: bool = False,
        predictor_input: PredictorInput = "mlp",
        prompt: Tensor | None = None,
    ) -> None:
        method = get_method(name, sparsity=0.0 if state is None else state.sparsity, **params or {})
        self.decode, self.method = decode, settled(method, state)
        self.predictor: Any = None
        self.calibrated: list[Calibrated] | None = None
        self.thresholds = torch.full((len(decode.mlps),), -math.inf)
        self._random = _Random(decode, seed)
        self._kernels: DecodeKernels | None = None
        self._prompt: list[Tensor] = []
        if self.method.needs_prompt:
            if prompt is None:
                raise InputError(f"method {name} ranks by the prompt: hand over the one that the steps follow")
            self._prompt = prompt_sums(decode, prompt)
        if state is not None:
            self.thresholds = checked_thresholds(decode.model, self.method, state)
            if self.method.needs_calibration:
                self.calibrated = placed_calibration(decode.model, self.method, state)
            if isinstance(state, PredictorState):
                self.predictor = placed_predictor(decode.model, state)
        elif rank is not None and self.method.needs_predictor:
            predicted = self.method.predicted if gated else ()
            self.predictor = RandomPredictor.make(decode, rank, seed, predicted, predictor_input)

    def score(self, activations: Activations) -> Tensor:
        """What the set is chosen by, fp32, (1, d_ff): the predictor's logits, or the method's own score."""
        layer = activations.site.layer
        if self.predictor is not None:
            seen = activations.block if self.predictor.predictor_input == "block" else activations.input
            logits: Tensor = self.predictor.logits(layer, seen)
            return logits
        if self.calibrated is not None:
            activations = replace(activations, calibrated=self.calibrated[layer])
        if self._prompt:
            activations = replace(activations, prompts=lambda: self._prompt[layer])
        return self.method.score(activations).float()

    def _measure(self, start: tuple[int, int]) -> list[Calibrated]:
        """Mean squares that the score asks for, of the tokens of some dense decode steps; factors with random matrices."""
        sums: list[dict[str, Tensor]] = [{} for _ in self.decode.mlps]

        def choose(activations: Activations) -> Tensor:
            layer = sums[activations.site.layer]
            for name in self.method.moments:
                part = getattr(activations, name)[0].float().square() / _CALIBRATION_STEPS
                layer[name] = layer[name] + part if name in layer else part
            return torch.ones_like(activations.product, dtype=torch.bool)

        if self.method.moments:
            self._follow(choose, start)
        ranks = self.method.factors
        return [
            Calibrated(moments=layer, factors={name: self._random.factor(rank) for name, rank in ranks.items()})
            for layer in sums
        ]

    def _follow(self, choose: Choose, start: tuple[int, int]) -> None:
        mlp = MaskedMlp(self.decode, choose)
        self.decode.rewind(*start)
        for _ in range(_CALIBRATION_STEPS):
            self.decode.step(mlp)

    def calibrate(self, sparsity: float, start: tuple[int, int]) -> None:
        """Thresholds that keep the target on decode steps with every layer sparse: the median kth score of some tokens.

        A fixed set needs none: it keeps exactly k.
        """
        self.method = replace(self.method, sparsity=sparsity)
        if self.method.needs_calibration and self.calibrated is None:
            self.calibrated = self._measure(start)
        if self.method.fixed_set:
            return
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
        score = self.score(activations)
        if self.method.fixed_set:
            return select_top_k(score, kept_count(score.shape[-1], self.method.sparsity_at(activations.site)))
        return select_threshold(score, float(self.thresholds[activations.site.layer]))

    def kernels(self) -> DecodeKernels:
        """Kernels with the thresholds as they are now; on a GPU they hold one copy of W_down for all sparsities."""
        if isinstance(self._kernels, ChoosingKernels):
            for layer, threshold in zip(self._kernels.layers, self.thresholds.tolist(), strict=True):
                layer.threshold = threshold
            return self._kernels
        thresholds = None if self.method.fixed_set else self.thresholds
        self._kernels = decode_kernels(
            self.decode.model, self.method, thresholds, self.predictor, calibrated=self.calibrated
        )
        if self.method.needs_prompt and isinstance(self._kernels, PromptKernels):
            for mlp in self.decode.mlps:
                x = torch.zeros(1, mlp.d_model, dtype=self.decode.dtype, device=self.decode.device)
                with torch.no_grad():
                    self._kernels.gather(mlp.layer, self.choose(mlp.activations(x)))
        return self._kernels

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the dense model's, with kernels: what they copied, the predictor, what a fit holds."""
        if isinstance(self._kernels, GatheredLayers):
            return self._kernels.extra_bytes
        extra = [mlp.weights()[2] for mlp in self.decode.mlps]
        if self.predictor is not None:
            extra += [*self.predictor.v, *self.predictor.u, *getattr(self.predictor, "residual", ())]
        for known in self.calibrated or ():
            extra += known.moments.values()
            extra += [part for factor in known.factors.values() for part in (factor.v, factor.u, factor.residual)]
        if isinstance(self._kernels, ChoosingKernels):
            extra += self._kernels.copies
        return sum(matrix.numel() * matrix.element_size() for matrix in extra)


@torch.no_grad()
def prompt_sums(decode: DecodeModel, prompt: Tensor) -> list[Tensor]:
    """Of every layer what `Activations.prompt` is after a dense pass over a prompt (1, n_tokens), (1, d_ff), fp32."""
    sums: list[Tensor] = []

    def watching(mlp: GatedMLP) -> Callable[[Any, tuple[Tensor]], None]:
        def hook(_module: Any, arguments: tuple[Tensor]) -> None:
            sums.append(shares_of_norm(mlp.activations(arguments[0].flatten(0, -2)).product).sum(0, keepdim=True))

        return hook

    with ExitStack() as undo:
        for mlp in decode.mlps:
            undo.callback(mlp.module.register_forward_pre_hook(watching(mlp)).remove)
        model: Any = decode.model
        model(input_ids=prompt, use_cache=False, logits_to_keep=1)
    return sums
