"""Tokens of whole models: one sequence, greedy, dense and sparse in the same loop, and dense by transformers' own.

On a GPU a step is one CUDA graph that feeds itself its next token; on a CPU it is called. `suite.speed.decode_check` holds
the kernels' logits against the masked computation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from suite.decoding.graphs import captured
from suite.decoding.parts import Parts
from suite.decoding.shapes import SHAPES, build_model, has_weights, model_name, prompt_tokens
from suite.decoding.sparse import SparseMethod
from suite.decoding.step import DecodeModel, Mlp
from suite.devices import DTYPE_BYTES
from suite.modeling.decode import KERNEL_DTYPES
from suite.speed.case import Check, Kernel, Progress, Row, SpeedCase, States, needed_bytes, phase_row
from suite.speed.clock import ReadBandwidth, Rounds, cpu_bandwidth, cuda_bandwidth, event_times, wall_times
from suite.speed.decode_check import check, check_dense
from suite.speed.layer import why_no_kernel
from suite.speed.rig import Rig, Subject

if TYPE_CHECKING:
    from torch import nn

    from suite.modeling.decode import DecodeKernels

_ROUND_STEPS, _COUNTED_STEPS, _PART_CALLS = 12, 12, 3
_STEPS = 260  # most steps after the prompt: those of the check with real weights
_GENERATED = 48
_RESERVED = 2 << 30  # bytes of cache, workspaces and what torch itself takes
_PARTS = ("attention", "MLP", "head")
_CONTEXT = 128


class Context:
    """A model's decode steps after a prompt, with the dense step held against the model's own forward pass."""

    def __init__(self, model: nn.Module, case: SpeedCase, parts: Parts | None, seed: int, tell: Progress) -> None:
        start = time.perf_counter()
        self.n_tokens = context_of(case)
        self.decode = DecodeModel(model, self.n_tokens + _STEPS, parts)
        vocabulary = int(self.decode.head.shape[0])
        self.prompt = prompt_tokens(case.model_shape, self.n_tokens, vocabulary, seed).to(self.decode.device)
        self.decode.prefill(self.prompt)
        self.start = int(self.decode.token), int(self.decode.position)
        self.dense = check_dense(self.decode, self.prompt, self.start)
        self.jit_s = time.perf_counter() - start
        self.methods: dict[tuple[object, ...], SparseMethod] = {}
        tell(self.dense.summary)

    def token_bytes(self, case: SpeedCase, realised: float) -> float:
        """Bytes that a token has to read: MLPs at a realised sparsity, attention, head, keys and values of the context."""
        decode = self.decode
        attention = sum(a.weight.numel() + a.out.numel() for a in decode.attentions)
        heads = [a.heads for a in decode.attentions]
        cache = sum(2 * h.n_kv * h.head_dim * min(self.n_tokens, h.window or self.n_tokens) for h in heads)
        rest = (attention + decode.head.numel() + cache) * DTYPE_BYTES[case.dtype]
        return needed_bytes(case, realised) * len(decode.mlps) + rest


def context_of(case: SpeedCase) -> int:
    """Tokens in the cache."""
    return case.context_tokens or _CONTEXT


class StepSubject(Subject):
    """Steps of the own loop, dense or sparse; ``method`` is None for dense."""

    rounds = Rounds(least=10, most=10)

    def __init__(self, case: SpeedCase, context: Context, method: SparseMethod | None, tell: Progress) -> None:
        super().__init__(case)
        self._context, self._decode, self._method, self._tell = context, context.decode, method, tell
        self._kernels: DecodeKernels | None = None
        self._mlp: Mlp = context.decode.dense
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._run: Callable[[], None] = self._step
        self._parts: dict[str, Callable[[], None]] = {name: partial(self._part, name) for name in _PARTS}
        self._part_samples: dict[str, list[float]] = {name: [] for name in _PARTS}
        self._capture_s: float | None = None
        self._graphs: dict[str, Any] = {}
        self._realised = 0.0

    def check(self) -> Check:
        """As `suite.speed.decode_check` does."""
        case, context = self.case, self._context
        facts: Row = {"n_layers": len(self._decode.mlps), "model": model_name(case.model_shape)}
        outcome = context.dense
        if self._method is not None:
            self._kernels = self._method.kernels()
            self._mlp = self._kernels.run
            real = has_weights(case.model_shape)
            outcome = check(self._decode, self._method, self._kernels, context.start, real=real)
            self._tell(f"{case.label}: {outcome.summary}")
            facts |= {"extra_memory_mib": self._method.extra_bytes / 2**20}
            if (predictor := self._method.predictor) is not None:  # one with random matrices has no kind
                facts |= {"predictor": getattr(predictor, "predictor", case.predictor or "low-rank")}
            if self._method.method.factors:
                facts |= {"exact_chosen": self._method.method.exact_projection}
        passed = {} if outcome.reason else {"jit_s": context.jit_s, "decode_check": outcome.row}
        return Check(outcome.error, outcome.reason, facts | passed)

    def prepare(self) -> None:
        """Warm up, count what is kept, and capture graphs on a GPU."""
        layers, kept = range(len(self._decode.mlps)), []

        def watching(layer: int, x: Tensor, block: Tensor) -> Tensor:
            self._inputs.append((x.clone(), block.clone()))
            return self._mlp(layer, x, block)

        self._decode.rewind(*self._context.start)
        for _ in range(_COUNTED_STEPS):
            self._inputs.clear()
            self._decode.step(watching)
            if self._kernels is not None:
                kept.append(float(self._kernels.kept(layers, 1).double().mean()) / self.case.d_ff)
        self._realised = 1.0 - float(np.mean(kept)) if kept else 0.0
        if self.case.device == "cuda":
            begin = time.perf_counter()
            self._graphs = {name: captured(run) for name, run in (self._parts | {"step": self._step}).items()}
            self._capture_s = time.perf_counter() - begin
            self._parts = {name: self._graphs[name].replay for name in _PARTS}
            self._run = self._graphs["step"].replay

    def _step(self) -> None:
        self._decode.step(self._mlp)

    @torch.no_grad()
    def _part(self, name: str) -> None:
        """One part of a step alone; what attention writes at the present position, the next step overwrites."""
        decode = self._decode
        if name == "head":
            decode.parts.next_token(self._inputs[-1][0], decode.head)
            return
        for layer, (x, block) in enumerate(self._inputs):
            if name == "MLP":
                self._mlp(layer, x, block)
            else:
                decode.attentions[layer](x, decode.position, decode.parts)

    def run(self) -> None:
        """One token."""
        self._run()

    def sample(self, bandwidth: ReadBandwidth | None) -> list[float]:
        """Some tokens after the prompt, and each part alone; the first token is not timed: the caches are another case's."""
        clock = event_times if self.case.device == "cuda" else wall_times
        self._decode.rewind(*self._context.start)
        self._run()
        seconds = clock(self._run, _ROUND_STEPS)
        for name, part in self._parts.items():
            self._part_samples[name] += clock(part, _PART_CALLS)[1:]
        return seconds

    @property
    def needed_bytes(self) -> float:
        """Of all that a token reads."""
        return self._context.token_bytes(self.case, self._realised)

    def facts(self, seconds: float) -> Row:
        """Realised sparsity, tokens per second, and what each part takes."""
        found: Row = {
            "sparsity_realized": self._realised,
            "tokens_per_s": 1 / seconds,
            "mlp_share": float(np.median(self._part_samples["MLP"])) / seconds,
            "phases": phase_rows(self._part_samples, seconds),
            "capture_s": self._capture_s,
        }
        if self.case.device == "cuda":
            found["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return found


def phase_rows(parts: dict[str, list[float]], seconds: float) -> list[Row]:
    """Microseconds of each part of a step; the rest is norms, additions, embedding and what lies between the parts."""
    rows = [phase_row(name, [1e6 * sample for sample in samples]) for name, samples in parts.items()]
    rest = seconds * 1e6 - math.fsum(float(str(row["us_median"])) for row in rows)
    return [*rows, {"phase": "rest", "us_median": max(0.0, rest), "us_q05": None, "us_q95": None}]


class _Stamps:
    """Streamer of `generate`: when each token reached the host."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _tokens: Any) -> None:
        """One token."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """No more."""


class GenerateSubject(Subject):
    """Dense by transformers' own generate: dynamic cache, or (``compile``) a static one, which it compiles on a GPU."""

    rounds = Rounds(least=3, most=3)

    def __init__(self, case: SpeedCase, model: nn.Module, prompt: Tensor) -> None:
        super().__init__(case)
        self._model: Any = model
        self._prompt = prompt

    def check(self) -> Check:
        """It is the definition; the first run compiles what there is to compile."""
        compiled = self.case.variant == "compile"
        begin = time.perf_counter()
        self._generate(_GENERATED if compiled else 4)  # what is compiled is compiled for this length of the cache
        facts: Row = {"n_layers": SHAPES[self.case.model_shape].n_layers, "model": model_name(self.case.model_shape)}
        return Check(None, "", facts | {"jit_s": time.perf_counter() - begin if compiled else None})

    def prepare(self) -> None:
        """Nothing is left to make."""

    def _generate(self, n_tokens: int, streamer: _Stamps | None = None) -> None:
        options: dict[str, Any] = {"do_sample": False, "min_new_tokens": n_tokens, "max_new_tokens": n_tokens}
        options |= {"attention_mask": torch.ones_like(self._prompt), "pad_token_id": 0}
        if self.case.variant == "compile":
            options["cache_implementation"] = "static"
        with torch.inference_mode():
            self._model.generate(self._prompt, streamer=streamer, **options)

    def run(self) -> None:
        """One answer."""
        self._generate(_GENERATED)

    def sample(self, bandwidth: ReadBandwidth | None) -> list[float]:
        """Times between the tokens of an answer."""
        stamps = _Stamps()
        self._generate(_GENERATED, stamps)
        return [float(seconds) for seconds in np.diff(stamps.at[2:])]  # without the prompt, and the prefill's token

    def facts(self, seconds: float) -> Row:
        """Tokens per second."""
        return {"sparsity_realized": 0.0, "tokens_per_s": 1 / seconds}


class DecodeRig(Rig):
    """One model, its contexts one after another."""

    def __init__(self, cases: Sequence[SpeedCase], seed: int, tell: Progress, states: States) -> None:
        super().__init__(cases, seed, tell, states)
        self._parts: Parts | None = None
        self._present: Context | None = None

    @staticmethod
    def why_not(case: SpeedCase) -> str:
        """As `Rig`."""
        known = KERNEL_DTYPES[case.device]
        if not case.kernel.is_torch and case.dtype not in known:
            return f"dtype {case.dtype}: the kernels on {case.device} take {', '.join(known)}"
        return why_no_kernel(case)

    @staticmethod
    def no_room(cases: Sequence[SpeedCase]) -> str:
        """As `Rig`: the model with a copy of W_down for each method; says what would fit."""
        first, free = cases[0], free_bytes(cases[0].device)
        shape, size = SHAPES[first.model_shape], DTYPE_BYTES[first.dtype]
        copied = {_kind(case) for case in cases if not case.kernel.is_torch}
        copies = len(copied) + sum(3 * (1 - case.sparsity) for case in cases if case.kernel is Kernel.GATHERED)
        weights = shape.n_parameters + copies * shape.n_layers * first.d_model * first.d_ff
        needed = weights * size + _RESERVED
        if needed <= free:
            return ""
        fits = [name for name, shape in SHAPES.items() if 2 * shape.n_parameters * size + _RESERVED < free]
        return (
            f"{first.model_shape} in {first.dtype} needs about {needed / 2**30:.0f} GiB with its copies, "
            f"{free / 2**30:.0f} are free; {', '.join(fits) or 'no model'} would fit"
        )

    def __enter__(self) -> DecodeRig:
        self._threads = torch.get_num_threads()
        if self.cases[0].device == "cpu":
            torch.set_num_threads(self.cases[0].threads)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        if self.cases[0].device == "cuda":
            self._present = None
            torch.cuda.empty_cache()

    def batches(self) -> Iterator[Sequence[SpeedCase]]:
        """As `Rig`; builds the model. Transformers' loop, whose caches are its own, is not interleaved with the others."""
        first = self.cases[0]
        self.tell(f"building {first.model_shape}")
        self._model: nn.Module = build_model(first.model_shape, first.dtype, first.device, self.seed)
        for context in dict.fromkeys(context_of(case) for case in self.cases):
            mine = [case for case in self.cases if context_of(case) == context]
            yield from ([case] for case in mine if is_generate(case))
            if steps := [case for case in mine if not is_generate(case)]:
                yield steps

    def subject(self, case: SpeedCase) -> Subject:
        """As `Rig`."""
        context = self._context(case)
        if is_generate(case):
            return GenerateSubject(case, self._model, context.prompt)
        method = None if case.kernel is Kernel.DENSE else self._method(case, context)
        return StepSubject(case, context, method, self.tell)

    def _context(self, case: SpeedCase) -> Context:
        if self._present is None or self._present.n_tokens != context_of(case):
            self._present = None  # its cache and copies make room
            self._present = Context(self._model, case, self._parts, self.seed, self.tell)
            self._parts = self._present.decode.parts
        return self._present

    def _method(self, case: SpeedCase, context: Context) -> SparseMethod:
        """The case's method by its fit; else with thresholds for the target, on kernels that all its sparsities share."""
        options: dict[str, Any] = {"params": case.params}
        options |= {"prompt": context.prompt} if case.made.needs_prompt else {}
        if (state := self.states.get(case)) is not None:
            return SparseMethod(context.decode, case.method, state=state, **options)
        key = _kind(case)
        if key not in context.methods:
            if case.predictor:
                options |= {"gated": True, "predictor_input": case.predictor_input}
            method = SparseMethod(context.decode, case.method, case.rank, self.seed + 1, **options)
            context.methods[key] = method
        context.methods[key].calibrate(case.sparsity, context.start)
        return context.methods[key]

    def bandwidth(self) -> ReadBandwidth:
        """As `Rig`."""
        return cuda_bandwidth() if self.cases[0].device == "cuda" else cpu_bandwidth(self.cases[0].threads)


def _kind(case: SpeedCase) -> tuple[object, ...]:
    """What cases have in common that share a copy of the weights: all but the sparsity."""
    return case.method, str(case.params), case.rank, case.predictor, case.predictor_input


def is_generate(case: SpeedCase) -> bool:
    """Whether transformers' own loop is timed."""
    return case.variant in ("generate", "compile")


def free_bytes(device: str) -> int:
    """Memory that a model may take."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)
