"""Train predictors of several layers, methods and sparsities on one set of activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from suite.errors import CellError
from suite.fitting.linear import LowRank, Stack, Ternary, regression
from suite.fitting.options import Loss, PredictorOptions
from suite.methods.base import kept_count

Step = Callable[[float], None]

_WARM_UP = 0.1  # share of the steps
_WEIGHT_DECAY = 0.01
_MOST_WEIGHT = 100.0  # of one term of a weighted loss
_MOST_RATIO = 3.0


@dataclass
class Job:
    """Predictors of some layers for one method at one sparsity.

    Parameters
    ----------
    score : Tensor, shape (n_layers, n_tokens, d_ff)
        What the method ranks by; shared by the jobs of one method.
    kth : Tensor, shape (n_layers, n_tokens, 1), fp32
        The kth largest score of every token: label 1 for scores not below it.
    signed : bool
        Whether scores may be negative.
    stack : Stack
    loss : Tensor, shape (n_layers,), fp32
        Mean over the last tenth of the steps.
    """

    score: Tensor
    kth: Tensor
    signed: bool
    stack: Stack
    loss: Tensor

    def part(self, tokens: Tensor | slice) -> Batch:
        """Some of the tokens."""
        return Batch(self.score[:, tokens].float(), self.kth[:, tokens], self.signed)


@dataclass(frozen=True)
class Batch:
    """Scores and kth scores of some tokens, fp32, as in `Job`."""

    score: Tensor
    kth: Tensor
    signed: bool

    def kept(self) -> Tensor:
        """Labels."""
        return self.score >= self.kth

    def mass(self) -> Tensor:
        """``min((s/t)^2, 9)``, 1 at the kth score t; for signed scores ``s/t`` is 1 + (s - t) / (deviation over neurons).

        Capped, because (s/t)^2 of single neurons reaches 1e5: regression on it keeps .700 of the mass with the cap of 9,
        .667 with 100 and .692 on abs(s/t) (SmolLM2-135M, layers 3, 14 and 26, sparsity .8, 18000 tokens, rank 288).
        """
        if self.signed:
            ratio = 1 + (self.score - self.kth) / self.score.std(-1, keepdim=True).clamp(min=1e-12)
        else:
            ratio = self.score / self.kth.clamp(min=1e-30)
        return ratio.clamp_(0, _MOST_RATIO).square_()

    def weight(self, loss: Loss) -> Tensor:
        """Weight of every term of a cross-entropy, of mean 1 over the neurons of a token."""
        if loss == "bce":
            return torch.ones_like(self.score)
        size = self.score - self.kth if loss == "bce-margin" else self.score
        weight = size.square() if loss == "bce-square" else size.abs()
        weight = weight / weight.mean(-1, keepdim=True).clamp(min=1e-30)
        return weight.clamp_(max=_MOST_WEIGHT)


def kth_scores(score: Tensor, sparsities: Sequence[float]) -> list[Tensor]:
    """The kth largest score of every token for each sparsity; each of shape (n_layers, n_tokens, 1), fp32."""
    d_ff = score.shape[-1]
    counts = [kept_count(d_ff, sparsity) for sparsity in sparsities]
    parts = []
    for layer in score:
        for part in layer.split(16384):  # topk's workspace is as large as its input
            best = torch.topk(part, max(counts), dim=-1, sorted=True).values
            parts.append(torch.stack([best[:, count - 1] for count in counts]).float())
    joined = torch.cat(parts, dim=1).view(len(counts), *score.shape[:2], 1)
    return list(joined.unbind(0))


def make_job(
    options: PredictorOptions,
    layers: Sequence[int],
    x: Tensor,
    score: Tensor,
    kth: Tensor,
    seed: int,
    given: Sequence[Mapping[str, Tensor]] | None = None,
) -> Job:
    """A job with the predictors that its training starts from: those of ``options.start``, or ``given`` where it is random."""
    d_ff, d_model = score.shape[-1], x.shape[-1]
    rms = torch.stack([part.float().square().mean(0).sqrt() for part in x]).clamp(min=1e-6)
    signed = bool((score.amin() < 0).item())
    rank = options.rank_for(d_model)

    def target(tokens: slice) -> Tensor:
        part = Batch(score[:, tokens].float(), kth[:, tokens], signed)
        # first-order expansion of the logit that the loss tends to, where it is 0
        return (part.mass() - 1) / 2 if options.loss == "mass" else part.kept() * 4.0 - 2.0

    stack: Stack
    if given is not None and options.start == "random":
        first = [torch.stack([one[name].float() for one in given]).to(x.device) for name in given[0]]
        stack = LowRank(first[0], first[1], rms) if rank else Ternary.given(first[0])
    elif options.start == "random":
        stack = LowRank.random(layers, rms, d_ff, rank, seed) if rank else Ternary.random(layers, rms, d_ff, seed)
    else:
        v, u = regression(x, target, rank or d_model)
        stack = LowRank(v, u, rms) if rank else Ternary.given(u @ v.mT)
    return Job(score, kth, signed, stack, torch.zeros(len(layers), device=x.device))


def train(
    x: Tensor, jobs: Sequence[Job], layers: Sequence[int], options: PredictorOptions, seed: int, step: Step
) -> None:
    """Train every job's stack in place, all on the same batches.

    Parameters
    ----------
    x : Tensor, shape (n_layers, n_tokens, d_model)
        Inputs of the MLPs; the products of the training are in its dtype, the master weights in fp32.
    layers : their indices, for messages
    step : called after each step with the share of them that is done

    Raises
    ------
    CellError
        The loss of a layer is not a number.
    """
    n_tokens = x.shape[1]
    n_steps = math.ceil(n_tokens / options.batch_tokens) * options.epochs
    fused = x.device.type == "cuda"
    optimizers = [
        torch.optim.AdamW(job.stack.parameters, lr=options.learning_rate, weight_decay=_WEIGHT_DECAY, fused=fused)
        for job in jobs
    ]
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for _ in range(options.epochs):
        for index in torch.randperm(n_tokens, generator=generator).to(x.device).split(options.batch_tokens):
            batch = x[:, index]
            rate = options.learning_rate * _rate(options, done, n_steps)
            done += 1
            for job, optimizer in zip(jobs, optimizers, strict=True):
                logit = job.stack.forward(batch)
                gradient, loss = _loss(logit, job.part(index), options, done > 0.9 * n_steps)
                job.stack.backward(batch, gradient.to(batch.dtype))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                if loss is not None:
                    job.loss += loss / (n_steps - math.floor(0.9 * n_steps))
            step(done / n_steps)
        for job in jobs:
            _check(job, layers)


def _rate(options: PredictorOptions, step: int, n_steps: int) -> float:
    """Learning rate of a step over the highest one."""
    warm_up = max(1.0, _WARM_UP * n_steps)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    if options.schedule == "linear":
        return max(0.0, (n_steps - step) / (n_steps - warm_up + 1))
    return math.sqrt(warm_up / step)


def _loss(logit: Tensor, batch: Batch, options: PredictorOptions, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of the loss (mean over tokens and neurons) by the logits, and the loss of every layer if it is wanted.

    Every term is ``p softplus(-z) + n softplus(z)`` with weights p and n.
    """
    if options.loss == "mass":
        positive = batch.mass() * options.pos_weight
        both = positive + 1
    else:
        weight, kept = batch.weight(options.loss), batch.kept()
        positive = weight * kept * options.pos_weight
        both = positive + weight * ~kept
    logit = logit.float()
    gradient = (torch.sigmoid(logit).mul_(both).sub_(positive)) / (logit.shape[-1] * logit.shape[-2])
    if not wanted:
        return gradient, None
    return gradient, (both * softplus(logit) - positive * logit).mean((1, 2))


def _check(job: Job, layers: Sequence[int]) -> None:
    for index, layer in enumerate(layers):
        if not all(bool(p[index].isfinite().all()) for p in job.stack.parameters):
            raise CellError(f"the loss of the predictor of layer {layer} is NaN: give a smaller learning rate")
