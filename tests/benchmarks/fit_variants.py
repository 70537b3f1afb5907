"""Ways of fitting what `fit_ablation` compares: low-rank guesses of gate and up, their terms, their weights, their training.

Every one is a score ``sqrt(k0 + k1 a^2 + k2 u^2 + k3 a^2 u^2)``, where a and u are exact or of a low rank and k are four
numbers a neuron. What proves useful moves to suite/fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from suite.fitting.artifacts import Fit
from suite.fitting.histogram import exact_quantile
from suite.fitting.moments import low_rank
from suite.fitting.stream import method_scores, mlp_inputs
from suite.fitting.thresholds import ThresholdFitter
from suite.fitting.training import kth_scores
from suite.fitting.windows import PredictorWindows
from suite.methods.base import Activations, Factor, Method, PredictorInput
from suite.modeling.attach import attach
from suite.modeling.gated_mlp import GatedMLP, activation, find_gated_mlps
from suite.modeling.loading import LoadedModel
from suite.registry import get_method

CHUNK = 2048
_CAP = 9.0  # of the mass loss, as in suite/fitting/training.py


@dataclass(frozen=True)
class Variant:
    """A way of fitting.

    Parameters
    ----------
    gate, up : rank of each; 0 for exact; with ``shared`` both have that of gate, of one V
    terms : of "c" and "e", the residuals that the score adds; "quadratic": four coefficients by least squares
    rows : what the errors of a neuron are weighted by: nothing, the other projection's mean square, or that and the square
        of the activation function's slope
    relative : whether a token counts by what it is over its own mass of v^2
    scale : whether every neuron's score is multiplied so that its mean square is right
    norm : whether it is multiplied by the norm of the column of W_down
    bits : of an entry of the factors; 8 rounds to int8 with a scale a column of V and a row of U
    goal : threshold of the mass loss: of the layer, or of every token
    """

    gate: int
    up: int
    terms: str = "ce"
    rounds: int = 1
    shared: bool = False
    rows: Literal["", "other", "slope"] = ""
    relative: bool = False
    scale: bool = False
    norm: bool = False
    bits: int = 16
    epochs: int = 0
    rate: float = 1e-2
    goal: Literal["layer", "token"] = "layer"
    predictor_input: PredictorInput = "mlp"

    def share(self, d_model: int, d_ff: int, vectors: int) -> float:
        """Bytes beside the layer over those of the dense layer in 2 bytes."""
        ranks = [self.gate] if self.shared else [self.gate, self.up]
        weights = sum(ranks) * d_model + (2 * self.gate if self.shared else sum(ranks)) * d_ff
        return (weights * self.bits / 16 + 2 * vectors * d_ff) / (3 * d_model * d_ff)


@dataclass
class Layer:
    """What is fitted of a layer: guesses of gate and up, None where exact, and coefficients (4, d_ff), fp32."""

    gate: Factor | None
    up: Factor | None
    k: Tensor

    def squares(self, made: Activations, seen: Tensor) -> tuple[Tensor, Tensor]:
        """``a^2`` and ``u^2``, each (n_tokens, d_ff), fp32."""
        act = made.act.float() if self.gate is None else made.act_fn(self.gate.apply(seen))
        up = made.up.float() if self.up is None else self.up.apply(seen)
        return act.square(), up.square()

    def score(self, made: Activations, seen: Tensor) -> Tensor:
        """Root of the expected square."""
        return combine(self.k, *self.squares(made, seen)).sqrt()


def combine(k: Tensor, a2: Tensor, u2: Tensor) -> Tensor:
    """The expected square."""
    return k[..., 0, :] + k[..., 1, :] * a2 + k[..., 2, :] * u2 + k[..., 3, :] * a2 * u2


@dataclass(frozen=True, kw_only=True)
class Scored(Method):
    """A method of fitted layers; its practical mode is a threshold on their scores."""

    layers: tuple[Layer, ...] = ()
    reads: PredictorInput = "mlp"
    name: ClassVar[str] = "scored"

    @property
    def predictor_input(self) -> PredictorInput:
        return self.reads

    def score(self, activations: Activations) -> Tensor:
        seen = activations.block if self.reads == "block" else activations.input
        return self.layers[activations.site.layer].score(activations, seen)


def fit_variant(
    loaded: LoadedModel, variant: Variant, windows: PredictorWindows, sparsity: float, dense: Callable[[bool], Tensor]
) -> tuple[Method, Fit]:
    """Fitted method and thresholds; ``dense`` gives all layers' inputs, or their blocks', in the dense model."""
    mlps = find_gated_mlps(loaded.model)
    of_block = variant.predictor_input == "block"
    method: Method = get_method("dense")
    state: Fit | None = None
    for number in range(variant.rounds):
        with attach(loaded.model, method, state) if number else nullcontext():
            if number == 0:
                x, seen = dense(False), dense(of_block)
            else:
                x = mlp_inputs(loaded.model, mlps, windows.train)
                seen = mlp_inputs(loaded.model, mlps, windows.train, of_block=True) if of_block else x
        with torch.inference_mode():
            layers = [_closed_form(variant, mlp, x[i], seen[i]) for i, mlp in enumerate(mlps)]
        if variant.epochs:
            at_once = len(mlps) if x.device.type == "cuda" else 1
            for first in range(0, len(mlps), at_once):
                part = slice(first, first + at_once)
                layers[part] = _train(variant, mlps[part], x[part], seen[part], layers[part], sparsity)
        method = Scored(sparsity=sparsity, layers=tuple(layers), reads=variant.predictor_input)
        found = ThresholdFitter(loaded, method).fit(windows.thresholds, "calibrated")
        state = Fit(method.name, sparsity, "calibrated", found, "")
    assert state is not None
    return method, state


def _closed_form(variant: Variant, mlp: GatedMLP, x: Tensor, seen: Tensor) -> Layer:
    gram, cross = (torch.zeros(mlp.d_model, mlp.d_model, device=x.device) for _ in range(2))
    weight = torch.zeros(2, mlp.d_ff, device=x.device)
    for own, read in zip(x.split(CHUNK), seen.split(CHUNK), strict=True):
        made = mlp.activations(own)
        share = torch.ones(len(own), 1, device=x.device)
        if variant.relative:
            share = 1 / made.product.float().square().mean(-1, keepdim=True).clamp(min=1e-12)
        gram += (share * read).T @ read.float() / len(x)
        cross += (share * own).T @ read.float() / len(x)
        slope = _slope(mlp, made.gate.float()).square() if variant.rows == "slope" else 1.0
        weight[0] += (share * made.up.float().square() * slope).sum(0) / len(x)
        weight[1] += (share * made.act.float().square()).sum(0) / len(x)
    if not variant.rows:
        weight.fill_(1)
    gate, up = _factors(variant, mlp, gram, cross if seen is not x else None, weight.clamp(min=1e-12).sqrt())
    layer = Layer(gate, up, torch.zeros(4, mlp.d_ff, device=x.device))
    layer.k = _coefficients(variant, mlp, layer, x, seen)
    if variant.norm:
        layer.k *= mlp.norm2("down", "columns")
    return layer


def _slope(mlp: GatedMLP, gate: Tensor) -> Tensor:
    """Slope of the activation function by a difference."""
    return (mlp.act(gate + 0.01) - mlp.act(gate - 0.01)) / 0.02


def _factors(
    variant: Variant, mlp: GatedMLP, gram: Tensor, cross: Tensor | None, weight: Tensor
) -> tuple[Factor | None, Factor | None]:
    parts = [part.detach() for part in mlp.weights()[:2]]
    dtype = parts[0].dtype
    scaled = [part.float() * w[:, None] for part, w in zip(parts, weight, strict=True)]

    def placed(v: Tensor, u: Tensor, w: Tensor) -> Factor:
        u = u / w[:, None]
        if variant.bits == 8:
            v, u = _int8(v, 0), _int8(u, 1)
        return Factor(v.to(dtype), u.to(dtype), torch.zeros(len(u), device=u.device))

    if variant.shared:
        both = low_rank(torch.cat(scaled), gram, variant.gate, cross)
        first, second = both.u.chunk(2)
        return placed(both.v, first, weight[0]), placed(both.v, second, weight[1])
    found: list[Factor | None] = []
    for one, w, rank in zip(scaled, weight, (variant.gate, variant.up), strict=True):
        factor = low_rank(one, gram, rank, cross) if rank else None
        found.append(None if factor is None else placed(factor.v, factor.u, w))
    return found[0], found[1]


def _int8(matrix: Tensor, dim: int) -> Tensor:
    size = matrix.abs().amax(dim, keepdim=True).clamp(min=1e-12) / 127
    return (matrix / size).round() * size


def _coefficients(variant: Variant, mlp: GatedMLP, layer: Layer, x: Tensor, seen: Tensor) -> Tensor:
    """k by the terms: of residuals of products, or by least squares over ``v^2 / score^4``."""
    zero = torch.zeros(mlp.d_ff, device=x.device)
    c, e, one = zero.clone(), zero.clone(), zero + 1

    def chunks() -> Any:
        for own, read in zip(x.split(CHUNK), seen.split(CHUNK), strict=True):
            made = mlp.activations(own)
            yield made, read

    for made, read in chunks():
        if layer.gate is not None:
            c += (made.act.float() - made.act_fn(layer.gate.apply(read))).square().sum(0) / len(x)
        if layer.up is not None:
            e += (made.up.float() - layer.up.apply(read)).square().sum(0) / len(x)
    c, e = (
        value if name in variant.terms or variant.terms == "quadratic" else zero for name, value in (("c", c), ("e", e))
    )
    k = torch.stack([c * e, e, c, one])
    if variant.terms == "quadratic":
        for _ in range(3):
            k = _least_squares(k, layer, chunks())
    if variant.scale:
        right, guessed = zero.double(), zero.double()
        for made, read in chunks():
            right += made.product.double().square().sum(0)
            guessed += combine(k, *layer.squares(made, read)).double().sum(0)
        k = k * (right / guessed.clamp(min=1e-300)).float()
    return k


def _least_squares(k: Tensor, layer: Layer, chunks: Any) -> Tensor:
    """One step of a gamma regression, whose variance is the square of its mean; never below a hundredth of what it was."""
    gram, cross = (
        torch.zeros(k.shape[1], 4, 4, device=k.device).double(),
        torch.zeros(k.shape[1], 4, device=k.device).double(),
    )
    size = k.clamp(min=1e-20)
    for made, read in chunks:
        a2, u2 = layer.squares(made, read)
        terms = torch.stack([torch.ones_like(a2), a2, u2, a2 * u2], -1) * size.T  # (n_tokens, d_ff, 4)
        mean = combine(k, a2, u2).clamp(min=1e-20)
        terms = terms / mean[..., None]
        gram += torch.einsum("tdi,tdj->dij", terms, terms).double()
        cross += torch.einsum("tdi,td->di", terms, made.product.float().square() / mean).double()
    ridge = 1e-3 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(4, device=k.device)
    moved = torch.linalg.solve(gram + ridge, cross + (ridge @ torch.ones_like(cross)[..., None])[..., 0])
    return (moved.clamp(0.01, 100).float() * size.T).T.contiguous()


def _train(
    variant: Variant, mlps: Sequence[GatedMLP], x: Tensor, seen: Tensor, layers: Sequence[Layer], sparsity: float
) -> list[Layer]:
    """Adam on the mass loss: the log of the expected square over the threshold's is the logit."""
    score = method_scores(mlps, [get_method("d-countdown", sparsity=sparsity)], x)[0]
    if variant.goal == "token":
        goal = kth_scores(score, [sparsity])[0]
    else:
        rows = [exact_quantile(one[:: max(1, len(one) // 4096)], sparsity) for one in score]
        goal = torch.tensor(rows, device=x.device)[:, None, None].expand(-1, x.shape[1], 1)
    goal = goal.clamp(min=1e-12)
    function = activation(mlps[0].activation)
    rms = torch.stack([one.float().square().mean(0).sqrt() for one in seen]).clamp(min=1e-6)[:, :, None]
    named = {
        name: [factor for layer in layers if (factor := getattr(layer, name)) is not None] for name in ("gate", "up")
    }
    masters: dict[str, Tensor] = {}
    sizes: dict[str, Tensor | float] = {}
    for name, factors in named.items():
        if not factors:
            continue
        one = {"v": torch.stack([f.v for f in factors]).float() * rms, "u": torch.stack([f.u for f in factors]).float()}
        for part, value in one.items():
            size = value.square().mean((1, 2), keepdim=True).sqrt()
            masters[f"{name}.{part}"], sizes[f"{name}.{part}"] = (value / size).clone(), size
    k = torch.stack([layer.k for layer in layers])
    for name, index in (("gate", 2), ("up", 1)):
        if named[name]:
            masters[f"{name}.log"], sizes[f"{name}.log"] = k[:, index].clamp(min=1e-20).log().clone(), 1.0
    parameters = [value.requires_grad_() for value in masters.values()]
    adam = torch.optim.Adam(parameters, lr=variant.rate, fused=x.device.type == "cuda")
    batch = 2048 if x.device.type == "cuda" else 512
    steps = -(-x.shape[1] // batch) * variant.epochs
    done, generator = 0, torch.Generator().manual_seed(0)

    def part(name: str) -> Tensor:
        return masters[name] * sizes[name]

    def guess(name: str, read: Tensor) -> Tensor:
        if variant.shared and name == "up":
            return (read @ part("gate.v").to(read.dtype)) @ part("up.u").to(read.dtype).mT
        return (read @ part(f"{name}.v").to(read.dtype)) @ part(f"{name}.u").to(read.dtype).mT

    for _ in range(variant.epochs):
        for index in torch.randperm(x.shape[1], generator=generator).to(x.device).split(batch):
            adam.param_groups[0]["lr"] = variant.rate * min(
                1.0, (done + 1) / (0.1 * steps + 1), 1.1 * (1 - done / steps)
            )
            own = x[:, index].clone()
            read = (seen[:, index] / rms.mT.to(seen.dtype)).clone()
            with torch.no_grad():
                made = [mlp.gate_up(one) for mlp, one in zip(mlps, own, strict=True)]
                gate, up = (torch.stack([one[j] for one in made]).float() for j in range(2))
                q = ((function(gate) * up).abs() / goal[:, index].clone()).square_().clamp_(max=_CAP)
            a2 = (function(guess("gate", read).float()) if named["gate"] else function(gate)).square()
            u2 = (guess("up", read).float() if named["up"] else up).square()
            if named["gate"]:
                a2 = a2 + masters["gate.log"].exp()[:, None]
            if named["up"]:
                u2 = u2 + masters["up.log"].exp()[:, None]
            logit = (a2 * u2).clamp(min=1e-20).log() - 2 * goal[:, index].clone().log()
            ((q + 1) * softplus(logit) - q * logit).mean((1, 2)).sum().backward()
            adam.step()
            adam.zero_grad()
            done += 1
    return _trained(layers, masters, {name: part(name) for name in masters}, rms, variant)


def _trained(
    layers: Sequence[Layer], masters: dict[str, Tensor], parts: dict[str, Tensor], rms: Tensor, variant: Variant
) -> list[Layer]:
    found = []
    for i, layer in enumerate(layers):
        factors: dict[str, Factor | None] = {}
        logs = {}
        for name in ("gate", "up"):
            before = getattr(layer, name)
            first = "gate" if variant.shared else name
            if before is None:
                factors[name], logs[name] = None, torch.zeros_like(layer.k[0])
                continue
            v, u = (parts[f"{first}.v"][i] / rms[i]).detach(), parts[f"{name}.u"][i].detach()
            factors[name] = replace(before, v=v.to(before.v.dtype), u=u.to(before.u.dtype))
            logs[name] = masters[f"{name}.log"][i].detach().exp()
        c, e = logs["gate"], logs["up"]
        k = torch.stack([c * e, e, c, torch.ones_like(c)])
        found.append(Layer(factors["gate"], factors["up"], k))
    return found
