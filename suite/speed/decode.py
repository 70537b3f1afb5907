"""Whole-model decode cases: one sequence, greedy, dense and sparse in the same loop, each checked before it is timed.

On a GPU a step is one CUDA graph that feeds itself its next token; on a CPU it is called. A model with real weights takes
its thresholds and predictors from fits. Of random weights thresholds are set on the decode steps themselves, so that the
realised sparsity is the target, and a predictor has random matrices: its cost is what counts. `suite.speed.decode_check`
holds the kernels' logits against the masked computation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from suite.decoding.parts import Parts
from suite.decoding.shapes import SHAPES, build_model, model_name, prompt_tokens
from suite.decoding.step import DecodeModel, Mlp
from suite.devices import DTYPE_BYTES
from suite.methods.base import kept_count
from suite.modeling.decode import ChoosingKernels, DecodeKernels, decode_kernels
from suite.modeling.modes import PredictorState, ThresholdState, checked_thresholds, placed_predictor
from suite.registry import get_method
from suite.speed.cases import Progress, Row, SpeedCase, States, empty_row, needed_bytes, skipped_row

if TYPE_CHECKING:
    from torch import nn

_CALIBRATION_STEPS = 12
_STEPS = 260  # most steps after the prompt: those of the check with real weights
_GENERATED = 48


@dataclass(frozen=True)
class RandomPredictor:
    """Low-rank matrices of every layer with random entries: v (d_model, rank), u (d_ff, rank)."""

    v: tuple[Tensor, ...]
    u: tuple[Tensor, ...]

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
    """The definition: every product dense, entries of v outside the set 0. ``chosen`` gives the set, bool (1, d_ff)."""

    def __init__(self, decode: DecodeModel, chosen: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> None:
        self._decode, self._chosen = decode, chosen

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """The MLP's output, (1, d_model)."""
        mlp = self._decode.mlps[layer]
        gate, up = mlp.gate_up(x)
        act = mlp.act(gate)
        return mlp.down((act * up) * self._chosen(layer, x, act, up))


class Method:
    """A sparse method of a model: its scores, thresholds and kernels.

    Parameters
    ----------
    decode, name
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
        self.decode, self.name = decode, name
        self.predictor: Any = None
        self.thresholds = torch.full((len(decode.mlps),), -math.inf)
        self._kernels: DecodeKernels | None = None
        if state is not None:
            self.thresholds = checked_thresholds(decode.model, get_method(name, sparsity=state.sparsity), state)
            if isinstance(state, PredictorState):
                self.predictor = placed_predictor(decode.model, state)
        elif rank is not None:
            self.predictor = RandomPredictor.make(decode, rank, seed)

    def score(self, layer: int, x: Tensor, act: Tensor, up: Tensor) -> Tensor:
        """What the threshold is set on, fp32, (1, d_ff)."""
        if self.predictor is not None:
            return self.predictor.logits(layer, x)
        return (act if self.name == "cats" else up).float().abs()

    def calibrate(self, sparsity: float, start: tuple[int, int]) -> None:
        """Thresholds that keep the target on decode steps with every layer sparse: the median kth score of some tokens."""
        n_layers = len(self.decode.mlps)
        seen: list[list[float]] = [[] for _ in range(n_layers)]

        def chosen(layer: int, x: Tensor, act: Tensor, up: Tensor) -> Tensor:
            score = self.score(layer, x, act, up)
            k = kept_count(score.shape[-1], sparsity)
            top = score.topk(min(k + 1, score.shape[-1]), dim=-1).values[0]
            seen[layer].append(float(top[k - 1 :].mean()) if len(top) > k else -math.inf)
            return score >= seen[layer][-1]

        mlp = MaskedMlp(self.decode, chosen)
        self.decode.rewind(*start)
        for _ in range(_CALIBRATION_STEPS):
            self.decode.step(mlp)
        self.thresholds = torch.tensor([float(np.median(values)) for values in seen])

    def masked(self, layer: int, x: Tensor, act: Tensor, up: Tensor) -> Tensor:
        """The method's own set."""
        return ~(self.score(layer, x, act, up) < float(self.thresholds[layer]))

    def kernels(self) -> DecodeKernels:
        """Kernels with the thresholds as they are now; on a GPU they hold one copy of W_down for all sparsities."""
        if isinstance(self._kernels, ChoosingKernels):
            for layer, threshold in zip(self._kernels.layers, self.thresholds.tolist(), strict=True):
                layer.threshold = threshold
        else:
            self._kernels = decode_kernels(self.decode.model, get_method(self.name), self.thresholds, self.predictor)
        return self._kernels

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the dense model's: transposed copies of W_down and the predictor."""
        extra = [mlp.weights()[2] for mlp in self.decode.mlps]
        if self.predictor is not None:
            extra += [*self.predictor.v, *self.predictor.u]
        return sum(matrix.numel() * matrix.element_size() for matrix in extra)


@dataclass
class Timed:
    """A case ready to be timed.

    Parameters
    ----------
    run : makes one step
    parts : name -> all attentions, all MLPs or the head alone, on inputs of such a step
    samples : seconds of a step, and of each part
    """

    case: SpeedCase
    run: Callable[[], None]
    parts: dict[str, Callable[[], None]]
    realised: float
    capture_s: float | None = None
    keep: list[Any] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    part_samples: dict[str, list[float]] = field(default_factory=dict)


def unavailable(device: str) -> str:
    """Reason why nothing can run on a device; empty if it can."""
    if device == "cpu":
        return ""
    from kernels_numba.gpu.host.checks import unavailable as no_cuda

    return no_cuda()


def free_bytes(device: str) -> int:
    """Memory that a model may take."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def too_big(cases: Sequence[SpeedCase], free: int) -> str:
    """Reason why a model with its copies does not fit, with what would; empty if it does."""
    first = cases[0]
    size = DTYPE_BYTES[first.dtype]
    layers = _n_layers(first)
    copies = len({case.method for case in cases if case.method != "dense"})
    needed = SHAPES[first.model_shape].n_parameters * size + copies * layers * first.d_model * first.d_ff * size
    needed += 2 << 30  # cache, workspaces and what torch itself takes
    if needed <= free:
        return ""
    fits = [name for name, shape in SHAPES.items() if 2 * shape.n_parameters * size + (2 << 30) < free]
    return (
        f"{first.model_shape} in {first.dtype} needs about {needed / 2**30:.0f} GiB with its copies, "
        f"{free / 2**30:.0f} are free; {', '.join(fits) or 'no model'} would fit"
    )


def _n_layers(case: SpeedCase) -> int:
    return SHAPES[case.model_shape].n_layers


def time_group(
    cases: Sequence[SpeedCase], *, seed: int = 0, progress: Progress | None = None, states: States | None = None
) -> list[Row]:
    """Check and time the decode cases of one model; rows and states as `suite.speed.cases.run_group`."""

    def tell(text: str) -> None:
        if progress is not None:
            progress(text)

    first = cases[0]
    reason = unavailable(first.device) or too_big(cases, free_bytes(first.device))
    if reason:
        return [skipped_row(case, reason) for case in cases]
    before = torch.get_num_threads()
    try:
        if first.device == "cpu":
            torch.set_num_threads(first.threads)
        return _Group(cases, seed, tell, states or {}).rows()
    finally:
        torch.set_num_threads(before)
        if first.device == "cuda":
            torch.cuda.empty_cache()


class _Group:
    """The cases of one model: built once, its contexts one after another."""

    def __init__(self, cases: Sequence[SpeedCase], seed: int, tell: Progress, states: States) -> None:
        self.cases, self.seed, self.tell, self.states = cases, seed, tell, states
        first = cases[0]
        self.device = first.device
        tell(f"building {first.model_shape}")
        self.parts: Parts | None = None
        self.model: nn.Module = build_model(first.model_shape, first.dtype, first.device, seed)

    def rows(self) -> list[Row]:
        """One row a case, in order."""
        found: dict[SpeedCase, Row] = {}
        for context in dict.fromkeys(case.context_tokens or 128 for case in self.cases):
            mine = [case for case in self.cases if (case.context_tokens or 128) == context]
            try:
                found |= self._context(context, mine)
            except torch.OutOfMemoryError as error:
                line = " ".join(str(error).split())[:200]
                failed: Row = {"check": "failed", "status": "failed", "reason": f"out of memory: {line}"}
                found |= {case: empty_row(case) | failed for case in mine if case not in found}
        return [found[case] for case in self.cases]

    def _context(self, context: int, cases: Sequence[SpeedCase]) -> dict[SpeedCase, Row]:
        from suite.speed.decode_check import check, check_dense
        from suite.speed.decode_time import device_facts, generate_row, numbers, prepare, time_all

        start_jit = time.perf_counter()
        decode = DecodeModel(self.model, context + _STEPS, self.parts)
        self.parts = decode.parts
        first, vocabulary = self.cases[0], int(decode.head.shape[0])
        prompt = prompt_tokens(first.model_shape, context, vocabulary, self.seed).to(decode.device)
        decode.prefill(prompt)
        start = int(decode.token), int(decode.position)
        dense = check_dense(decode, prompt, start)
        jit_s = time.perf_counter() - start_jit
        self.tell(dense.summary)
        methods: dict[tuple[str, int | None], Method] = {}
        rows: dict[SpeedCase, Row] = {}
        timed: list[Timed] = []
        for case in cases:
            row = (
                empty_row(case)
                | {"n_layers": len(decode.mlps), "model": model_name(case.model_shape)}
                | device_facts(case)
            )
            rows[case] = row
            if case.variant in ("generate", "compile"):
                self.tell(case.label)
                rows[case] |= generate_row(case, self.model, prompt, _GENERATED)
                continue
            self.tell(f"check {case.label} context {context}")
            mlp: Mlp = decode.dense
            outcome, kernels = dense, None
            row["max_rel_error"] = dense.error
            if case.method != "dense":
                method = self._method(case, decode, methods, start)
                kernels = method.kernels()
                mlp = kernels.run
                outcome = check(decode, method, kernels, start, real=case.model_shape == "embedded")
                self.tell(f"{case.label}: {outcome.summary}")
                row |= {"max_rel_error": outcome.error, "extra_memory_mib": method.extra_bytes / 2**20}
                row |= {"predictor": "low-rank"} if case.rank is not None else {}
            if outcome.reason:
                rows[case] = row | {"check": "failed", "status": "failed", "reason": outcome.reason}
                continue
            rows[case] = row | {"check": "passed", "jit_s": jit_s, "decode_check": outcome.row}
            timed.append(prepare(case, decode, mlp, kernels, start))
        bandwidth = time_all(decode, timed, start, self.tell)
        for entry in timed:
            rows[entry.case] |= numbers(entry, decode, context, bandwidth)
        return rows

    def _method(
        self, case: SpeedCase, decode: DecodeModel, made: dict[tuple[str, int | None], Method], start: tuple[int, int]
    ) -> Method:
        """The case's method by its fit; else with thresholds for the target, on kernels that all its sparsities share."""
        if (state := self.states.get(case)) is not None:
            return Method(decode, case.method, state=state)
        key = case.method, case.rank
        if key not in made:
            made[key] = Method(decode, case.method, case.rank, self.seed + 1)
        made[key].calibrate(case.sparsity, start)
        return made[key]


def token_bytes(case: SpeedCase, decode: DecodeModel, context: int, realised: float) -> float:
    """Bytes that a token has to read: MLPs at a realised sparsity, attention, head, keys and values of the context."""
    size = DTYPE_BYTES[case.dtype]
    attention = sum(a.weight.numel() + a.out.numel() for a in decode.attentions)
    heads = [a.heads for a in decode.attentions]
    cache = sum(2 * h.n_kv * h.head_dim * min(context, h.window or context) for h in heads)
    return needed_bytes(case, realised) * len(decode.mlps) + (attention + decode.head.numel() + cache) * size
