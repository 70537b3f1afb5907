"""Fit predictors: activations streamed from the model, layers trained a few at a time, thresholds, quality."""

from __future__ import annotations

import importlib.metadata
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from suite.devices import torch_dtype
from suite.errors import CellError, InputError
from suite.fitting.artifacts import PredictorFit
from suite.fitting.calibration import Calibration
from suite.fitting.gated import fit_layer, need_predicted
from suite.fitting.keys import predictor_key, training_key
from suite.fitting.options import PredictorOptions
from suite.fitting.partial import Finished
from suite.fitting.quality import layer_quality
from suite.fitting.stream import method_scores, mlp_inputs
from suite.fitting.thresholds import ThresholdFitter
from suite.fitting.training import kth_scores, make_job, train
from suite.fitting.windows import make_predictor_windows
from suite.methods.base import Method
from suite.modeling.attach import attach
from suite.modeling.gated_mlp import GatedMLP, find_gated_mlps
from suite.modeling.loading import LoadedModel, weights_fingerprint

Progress = Callable[[str], None]

_LEAST_TOKENS = 64  # in the training part
_QUIET_S = 3.0


@dataclass(frozen=True)
class Wanted:
    """A predictor to be fitted."""

    method: Method
    estimator: str = "calibrated"


@dataclass
class _Training:
    """Predictors of one method at one sparsity, in all layers."""

    method: Method
    key: str
    done: Finished
    fits: list[PredictorFit] = field(default_factory=list)


def fit_predictors(
    loaded: LoadedModel,
    wanted: Sequence[Wanted],
    calibration: Calibration,
    options: PredictorOptions | None = None,
    *,
    seed: int = 0,
    activation_budget_gib: float | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> list[PredictorFit]:
    """Fit predictors of one model on one text; what several methods and sparsities share is made once.

    Parameters
    ----------
    loaded : LoadedModel
    wanted : methods, each with its sparsity, and how their thresholds are set
    calibration : Calibration
        Documents are split into those to train on, to set the thresholds on, and to check on (an eighth of the tokens,
        at most 16384, each of the last two).
    seed : of the split, the batches and random starts
    activation_budget_gib : float, optional
        Memory for activations: decides how many layers are trained per pass over the text. Default: half of what is
        free on the device.
    folder : Path, optional
        Where trained layers are kept until the fits are stored, for a resumed fit; see `discard_partial`.
    progress : callable, optional
        Gets one line of text, at most every 3 s.

    Returns
    -------
    list of PredictorFit, on the CPU, in the order of `wanted`

    Raises
    ------
    InputError
        Method without predictor, rank above d_model, too little text, or a budget below one layer.
    CellError
        NaN activations or loss, or not enough memory.
    """
    return _Fitter(
        loaded, calibration, options or PredictorOptions(), seed, activation_budget_gib, folder, progress
    ).fit(wanted)


def discard_partial(fits: Sequence[PredictorFit], folder: Path) -> None:
    """Remove the trained layers that were kept for a resumed fit, once the fits are stored."""
    for fit in fits:
        Finished(folder, str(fit.meta["training_key"])).discard()


class _Fitter:
    def __init__(
        self,
        loaded: LoadedModel,
        calibration: Calibration,
        options: PredictorOptions,
        seed: int,
        budget_gib: float | None,
        folder: Path | None,
        progress: Progress | None,
    ) -> None:
        self._loaded, self._calibration, self._options, self._seed = loaded, calibration, options, seed
        self._folder, self._say = folder, progress or (lambda line: None)
        self._mlps = find_gated_mlps(loaded.model)
        self._gated = options.predictor == "gated"
        self._budget = _free_bytes(loaded.device) / 2 if budget_gib is None else budget_gib * 2**30
        self._fingerprint = weights_fingerprint(loaded.ref)
        self._told = self._begun = time.monotonic()
        self._work = self._work_done = 0.0

    def fit(self, wanted: Sequence[Wanted]) -> list[PredictorFit]:
        most = 0  # of the ranks of gated ones
        for want in wanted:
            if not want.method.needs_predictor:
                raise InputError(
                    f"method {want.method.name} has no predictor to fit: its practical mode is a threshold"
                )
            if self._gated:
                need_predicted(want.method)
                most = max(most, self._rank(want.method) or 0)
                if want.estimator != "calibrated":
                    raise InputError(
                        f"estimator {want.estimator!r} of a gated predictor: it has no logits; use calibrated"
                    )
        self._windows = make_predictor_windows(self._calibration, self._loaded.tokenizer, self._seed)
        n_train = sum(map(len, self._windows.train))
        if n_train < _LEAST_TOKENS:
            raise InputError(
                f"calibration {self._calibration.source}: {n_train} tokens to train a predictor on; give at least "
                f"{_LEAST_TOKENS}"
            )
        if n_train < most:
            raise InputError(
                f"rank {most} of a gated predictor is more than the {n_train} tokens it is fitted on: give more "
                "calibration text"
            )
        trainings: dict[str, _Training] = {}
        for want in wanted:
            key = self._training_key(want.method)
            trainings.setdefault(key, _Training(want.method, key, Finished(self._folder, key)))
        names = ", ".join(f"{one.method.name} {one.method.sparsity:g}" for one in trainings.values())
        self._say(f"fitting {self._options.predictor} predictors of {names} on {self._calibration.description}")
        self._work = len(self._mlps) * len(trainings) * self._options.rounds
        if self._loaded.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            self._rounds(list(trainings.values()))
            return [self._finish(trainings[self._training_key(w.method)], w.estimator) for w in wanted]
        except torch.cuda.OutOfMemoryError as error:
            gib = self._budget / 2**30
            raise CellError(
                f"out of GPU memory while fitting predictors within {gib:.3g} GiB of activations: give a smaller "
                f"--activation-budget-gib, such as {gib / 2:.2g}"
            ) from error

    def _training_key(self, method: Method) -> str:
        calibration = self._calibration
        return training_key(
            method, self._options, self._fingerprint, calibration.fingerprint(), calibration.max_tokens, self._seed,
            self._loaded.dtype,
        )  # fmt: skip

    def _rounds(self, trainings: list[_Training]) -> None:
        self._train_round(1, trainings)
        for number in range(2, self._options.rounds + 1):
            for training in trainings:  # each on activations of its own
                if not all(training.done.get(number, mlp.layer) for mlp in self._mlps):
                    fit = self._with_thresholds(self._draft(training, number - 1), training.method, "calibrated")
                    with attach(self._loaded.model, training.method, fit):
                        self._train_round(number, [training])

    def _train_round(self, number: int, trainings: list[_Training]) -> None:
        todo = [mlp for mlp in self._mlps if not all(one.done.get(number, mlp.layer) for one in trainings)]
        self._work_done += (len(self._mlps) - len(todo)) * len(trainings)
        per_pass = self._layers_per_pass(trainings)
        # as many layers in one product as there are: a CPU gains nothing, and what is finished is kept layer by layer
        at_once = per_pass if self._loaded.device == "cuda" else 1
        for start in range(0, len(todo), per_pass):
            mlps = todo[start : start + per_pass]
            inputs = mlp_inputs(self._loaded.model, mlps, self._windows.train)
            if self._gated:
                self._solve_layers(number, mlps, inputs, trainings)
                continue
            for first in range(0, len(mlps), at_once):
                part = slice(first, first + at_once)
                self._train_layers(number, mlps[part], inputs[part], trainings)

    def _layers_per_pass(self, trainings: list[_Training]) -> int:
        mlp = self._mlps[0]
        size = mlp.weights()[2].element_size()
        if self._gated:  # no scores, which are made a few tokens at a time
            token = self._input_bytes()
        else:
            n_scores = len({id_of(one.method) for one in trainings})
            token = self._input_bytes() + size * n_scores * mlp.d_ff + 4 * len(trainings)
        layer = token * sum(map(len, self._windows.train))
        if layer > self._budget:
            raise InputError(
                f"activations of one layer take {layer / 2**30:.2g} GiB, more than the activation budget of "
                f"{self._budget / 2**30:.2g} GiB: give a larger --activation-budget-gib, fewer tokens or fewer methods"
            )
        return min(len(self._mlps), int(self._budget // layer))

    def _solve_layers(self, number: int, mlps: list[GatedMLP], inputs: Tensor, trainings: list[_Training]) -> None:
        """Gated predictors, in closed form: methods of equal name share theirs, whatever the sparsity."""
        seen = self._read(mlps, inputs, self._windows.train)
        for slot, mlp in enumerate(mlps):
            solved: dict[str, tuple[dict[str, Tensor], float]] = {}
            for training in trainings:
                begun, name = time.monotonic(), id_of(training.method)
                if name not in solved:
                    x = inputs[slot]
                    read = x if seen is inputs else seen[slot]
                    solved[name] = fit_layer(mlp, training.method, x, read, self._rank(training.method) or 1)
                training.done.put(number, mlp.layer, *solved[name], time.monotonic() - begun)
                self._work_done += 1
            self._tell(0.0)

    def _rank(self, method: Method) -> int | None:
        return self._options.rank_for(self._mlps[0].d_model, max(1, len(method.predicted)))

    def _read(self, mlps: list[GatedMLP], inputs: Tensor, windows: Sequence[list[int]]) -> Tensor:
        """What the predictors read where the MLPs' inputs are these: those themselves, or their blocks' normed inputs."""
        if self._options.predictor_input == "mlp":
            return inputs
        return mlp_inputs(self._loaded.model, mlps, windows, of_block=True)

    def _train_layers(self, number: int, mlps: list[GatedMLP], inputs: Tensor, trainings: list[_Training]) -> None:
        begun = time.monotonic()
        layers = [mlp.layer for mlp in mlps]
        families: dict[str, list[_Training]] = {}
        for training in trainings:
            families.setdefault(id_of(training.method), []).append(training)
        scores = method_scores(mlps, [family[0].method for family in families.values()], inputs)
        x = inputs if inputs.device.type == "cuda" else inputs.float()
        jobs = []
        for score, family in zip(scores, families.values(), strict=True):
            kths = kth_scores(score, [one.method.sparsity for one in family])
            for kth, one in zip(kths, family, strict=True):
                before = [one.done.get(number - 1, layer) for layer in layers] if number > 1 else []
                given = [{name: part[name] for name in part if name in ("v", "u", "scale")} for part in before if part]
                jobs.append(make_job(self._options, layers, x, score, kth, self._seed, given or None))
        share = len(mlps) * len(jobs)
        train(x, jobs, layers, self._options, self._seed + number - 1, lambda done: self._tell(share * done))
        self._work_done += share
        self._tell(0.0)
        seconds = (time.monotonic() - begun) / share
        in_order = [one for family in families.values() for one in family]
        for job, training in zip(jobs, in_order, strict=True):
            losses = job.loss.tolist()
            for slot, layer in enumerate(layers):
                training.done.put(number, layer, job.stack.matrices(slot, torch.float32), losses[slot], seconds)

    def _tell(self, under_way: float) -> None:
        now = time.monotonic()
        done = self._work_done + under_way
        if now - self._told >= _QUIET_S and done:
            self._told = now
            left = (now - self._begun) * (self._work / done - 1)
            self._say(f"predictors: {100 * done / self._work:.0f} % trained, about {math.ceil(left)} s left")

    def _draft(self, training: _Training, number: int) -> PredictorFit:
        """The predictors of a round, in the model's dtype and on its device, with thresholds that keep everything."""
        found = [training.done.get(number, mlp.layer) or {} for mlp in self._mlps]
        dtype = torch_dtype(self._loaded.dtype)
        rank = self._rank(training.method)
        ternary = rank is None
        return PredictorFit(
            method=training.method.name,
            sparsity=training.method.sparsity,
            estimator="calibrated",
            predictor=self._options.predictor,
            rank=rank,
            thresholds=torch.full((len(found),), -torch.inf),
            v=() if ternary else tuple(part["v"].to(dtype) for part in found),
            u=tuple(part["u"] if ternary else part["u"].to(dtype) for part in found),
            scale=torch.cat([part["scale"] for part in found]) if ternary else None,
            residual=tuple(part["residual"] for part in found) if self._gated else (),
            predicted=training.method.predicted if self._gated else (),
            activation=self._mlps[0].activation if self._gated else "",
            predictor_input=self._options.predictor_input,
            key="",
        ).to(self._loaded.device)

    def _with_thresholds(self, fit: PredictorFit, method: Method, estimator: str) -> PredictorFit:
        if estimator == "zero" and method.sparsity > 0:
            # kept are logits above 0, so the threshold is the smallest number above it
            return replace(fit, thresholds=torch.full_like(fit.thresholds, torch.finfo(torch.float32).tiny))
        fitter = ThresholdFitter(self._loaded, method, fit)
        return replace(fit, thresholds=fitter.fit(self._windows.thresholds, "calibrated"))

    def _finish(self, training: _Training, estimator: str) -> PredictorFit:
        method = training.method
        draft = self._draft(training, self._options.rounds)
        fit = replace(self._with_thresholds(draft, method, estimator), estimator=estimator)
        layers: list[dict[str, float]] = []
        per_pass = max(1, int(self._budget // self._check_bytes()))
        with attach(self._loaded.model, method, fit):
            for start in range(0, len(self._mlps), per_pass):
                mlps = self._mlps[start : start + per_pass]
                inputs = mlp_inputs(self._loaded.model, mlps, self._windows.check)
                layers += layer_quality(fit, method, mlps, inputs, self._read(mlps, inputs, self._windows.check))
        seconds = []
        for mlp, values in zip(self._mlps, layers, strict=True):
            rounds = [training.done.get(number + 1, mlp.layer) or {} for number in range(self._options.rounds)]
            values["loss"] = float(rounds[-1]["loss"])
            seconds.append(math.fsum(float(one["fit_s"]) for one in rounds))
        meta = self._meta(method, layers) | {"training_key": training.key}
        cost = {
            "layer_fit_s": seconds,
            "total_s": round(time.monotonic() - self._begun, 3),
            "peak_memory_mib": _peak_memory_mib(self._loaded.device),
        }
        return replace(fit, key=predictor_key(training.key, estimator), meta=meta, cost=cost).to("cpu")

    def _input_bytes(self) -> int:
        """Of a token of one layer: the MLP's input, and the block's where predictors read that."""
        mlp = self._mlps[0]
        n_inputs = 1 if self._options.predictor_input == "mlp" else 2
        return int(n_inputs * mlp.weights()[2].element_size() * mlp.d_model)

    def _check_bytes(self) -> int:
        return self._input_bytes() * max(1, sum(map(len, self._windows.check)))

    def _meta(self, method: Method, layers: list[dict[str, float]]) -> dict[str, Any]:
        calibration = self._calibration
        realised = [values["sparsity_realized"] for values in layers]
        return {
            "model": self._loaded.ref.name,
            "model_fingerprint": self._fingerprint,
            "dtype": self._loaded.dtype,
            "device": self._loaded.device,
            "parameters": method.parameters(),
            "options": self._options.fields(),
            "calibration": calibration.source if calibration.source == "pydoc" else calibration.description,
            "calibration_description": calibration.description,
            "calibration_fingerprint": calibration.fingerprint(),
            "in_domain": calibration.in_domain,
            "max_tokens": calibration.max_tokens,
            "n_tokens": sum(map(len, self._windows.train)),
            "held_out_tokens": sum(map(len, self._windows.check)),
            "held_out_sparsity": realised,
            "held_out_sparsity_mean": math.fsum(realised) / len(realised),
            "layers": layers,
            "seed": self._seed,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        }


def id_of(method: Method) -> str:
    """Methods of equal name share their scores, whatever the sparsity."""
    parameters = {name: value for name, value in method.parameters().items() if name != "sparsity"}
    return repr((type(method), sorted(parameters.items())))


def _free_bytes(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(psutil.virtual_memory().available)


def _peak_memory_mib(device: str) -> float:
    """Most memory since the fit began (GPU) or since the process began (CPU)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
