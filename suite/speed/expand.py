"""Expands a block of a matrix into speed cases. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from suite.decoding.shapes import has_weights, shape_of
from suite.errors import InputError
from suite.methods.base import Method, PredictorInput
from suite.methods.cost import gated_rank
from suite.registry import did_you_mean, get_method
from suite.speed.case import GIVEN, Kernel, SpeedCase, kernel_of

LEVELS = ("op", "layer", "decode")
_KERNELS_OF = {"cpu": "numba-cpu", "cuda": "numba-cuda"}
BACKENDS = ("torch", *_KERNELS_OF.values())
PREDICTORS = ("low-rank", "gated")
Named = tuple[str, Mapping[str, Any]]  # a method and its parameters
_RANK = 512  # of a predictor with random matrices; of a whole model at most half of d_model


def default_threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@dataclass(frozen=True)
class _Block:
    """Axes of a block, as `make_cases` takes them."""

    level: str
    shapes: list[str]
    methods: list[Named]
    sparsities: list[float]
    dtypes: list[str]
    backends: list[str]
    batch_sizes: list[int]
    threads: list[int | str]
    variants: list[str]
    clocks: list[str]
    contexts: list[int]
    predictors: list[Literal["low-rank", "gated"]]
    predictor_inputs: list[PredictorInput]

    @property
    def devices(self) -> list[str]:
        """Devices of the backends; a CPU if there is none."""
        found = [device for device, backend in _KERNELS_OF.items() if backend in self.backends]
        return found or ["cpu"]

    def cases(self, shape: str, named: Named, device: str, threads: int | str, **axes: Any) -> Iterator[SpeedCase]:
        """Cases of a method at all its sparsities, with every predictor; the kernel decides backend and mode."""
        sizes, (method, params) = shape_of(shape), named
        kernel = kernel_of(method)
        for predictor, sparsity in product(
            self._choosers(shape, named), [0.0] if kernel is Kernel.DENSE else self.sparsities
        ):
            yield SpeedCase(
                level=self.level,
                model_shape=shape,
                d_model=sizes.d_model,
                d_ff=sizes.d_ff,
                activation=sizes.activation,
                method=method,
                params=params,
                mode=kernel.mode,
                sparsity=float(sparsity),
                backend="torch" if kernel.is_torch else _KERNELS_OF[device],
                device=device,
                threads=_thread_count(threads) if device == "cpu" else 0,
                **predictor,
                **axes,
            )

    def _choosers(self, shape: str, named: Named) -> list[dict[str, Any]]:
        """Fields that say what chooses: each predictor of a method that has one, or the factors of its score."""
        d_model, kernel = shape_of(shape).d_model, kernel_of(named[0])
        if kernel is Kernel.GIVEN:
            return [{}]
        made = get_method(named[0], **named[1])
        if kernel is Kernel.PREDICTOR:
            rank = min(_RANK, d_model // 2) if self.level == "decode" else _RANK
            found: list[dict[str, Any]] = [{"rank": rank}] if "low-rank" in self.predictors else []
            if "gated" in self.predictors and made.predicted:  # at the bytes of the low-rank one
                common = {"rank": gated_rank(rank, len(made.predicted)), "predictor": "gated"}
                found += [common | {"predictor_input": read} for read in self.predictor_inputs]
            if not found:
                raise InputError(
                    f"predictors gated of a speed block: method {named[0]} has no such predictor; name low-rank too, or leave "
                    "it out"
                )
            return found
        if not made.factors:
            return [{}]
        _check_factors(made, self.level, shape)
        rank, exact = max(made.factors.values()), made.exact_projection
        return [{"rank": rank, "predictor_input": made.predictor_input, "exact_projection": exact}]


def _check_factors(made: Method, level: str, shape: str) -> None:
    """Refuse what the layers of a shape do not allow, and what nothing decides."""
    d_model = shape_of(shape).d_model
    if (rank := max(made.factors.values())) > d_model:
        raise InputError(f"rank {rank} of method {made.name} is above d_model {d_model} of {shape}: give at most that")
    if level != "decode" and made.predictor_input == "block":
        raise InputError(f"predictor_input block of method {made.name}: a layer alone has none; use level decode")
    if level != "decode" or not has_weights(shape):
        for name, values in made.candidates.items():
            raise InputError(
                f"{name} {getattr(made, name)} of method {made.name}: no fit chooses it for a {level} row of {shape}; give "
                f"{' or '.join(map(str, values))}"
            )


def make_cases(
    shapes: Iterable[str],
    methods: Iterable[str | Named],
    sparsities: Iterable[float],
    *,
    level: str = "layer",
    dtypes: Iterable[str] = ("float32",),
    backends: Iterable[str] = ("torch", "numba-cpu"),
    batch_sizes: Iterable[int] = (1,),
    threads: Iterable[int | str] = ("all",),
    variants: Iterable[str] = ("eager",),
    clocks: Iterable[str] = ("wall",),
    contexts: Iterable[int] = (128,),
    predictors: Iterable[str] = ("low-rank",),
    predictor_inputs: Iterable[str] = ("mlp",),
) -> list[SpeedCase]:
    """All cases of a matrix block, those of one group side by side; combinations that mean nothing are left out.

    ``methods`` are names, or pairs of a name and its parameters. ``torch`` runs dense, once, whatever the sparsities, and the
    dense layers of a fixed set; the other backends run the sparse methods, those with a predictor with each of
    ``predictors``, a gated one with each of ``predictor_inputs``. The CPU
    knows the clock ``wall`` and the variant ``eager`` only, the GPU every other clock (``wall`` becomes ``graph``);
    the variant ``compile`` is of dense on the GPU, in a graph, ``no-overlap`` and ``trace`` of the CUDA kernels,
    ``deterministic`` of those that have another order of sums without it. Of a whole model sparse methods run in the
    own loop only (a graph on the GPU), dense also by the other variants.

    Raises
    ------
    InputError
        Unknown shape, method, level or backend, sparsity outside [0, 1), parameters that no case of the level has, predictors
        or inputs that no case would have, a case named twice.
    """
    named = [(method, {}) if isinstance(method, str) else method for method in methods]
    axes = (
        shapes, named, sparsities, dtypes, backends, batch_sizes, threads, variants, clocks, contexts, predictors,
        predictor_inputs,
    )  # fmt: skip
    block = _Block(level, *map(list, axes))  # type: ignore[arg-type]
    _check_names(block)
    cases = list(_decode_cases(block) if level == "decode" else _layer_cases(block))
    if len(set(cases)) != len(cases):
        twice = next(case for case in cases if cases.count(case) > 1)
        raise InputError(f"speed case {twice.label} is named twice: remove one")
    rank = {group: number for number, group in enumerate(dict.fromkeys(case.group for case in cases))}
    return sorted(cases, key=lambda case: rank[case.group])


def _layer_cases(block: _Block) -> Iterator[SpeedCase]:
    axes = (block.devices, block.shapes, block.dtypes, block.batch_sizes, block.threads)
    for device, shape, dtype, batch, threads in product(*axes):
        clocks = ["wall"] if device == "cpu" else [c if c != "wall" else "graph" for c in block.clocks]
        variants = ["eager"] if device == "cpu" else block.variants
        for backend, method, variant, clock in product(block.backends, block.methods, variants, clocks):
            kernel = kernel_of(method[0])
            if backend == ("torch" if kernel.is_torch else _KERNELS_OF[device]) and _exists(
                block.level, kernel, variant, clock
            ):
                more = {"dtype": dtype, "batch_size": batch, "variant": variant, "clock": clock}
                yield from block.cases(shape, method, device, threads, **more)


def _exists(level: str, kernel: Kernel, variant: str, clock: str) -> bool:
    """Whether a combination means something."""
    if level == "op" and kernel not in (Kernel.DENSE, Kernel.GIVEN):
        return False
    if variant == "compile":  # torch.compile competes for the fastest dense row alone
        return kernel is Kernel.DENSE and clock == "graph"
    if variant == "deterministic":
        return kernel is Kernel.THRESHOLD
    return variant == "eager" or not kernel.is_torch


def _decode_cases(block: _Block) -> Iterator[SpeedCase]:
    if block.batch_sizes != [1] or GIVEN in dict(block.methods):
        raise InputError("level decode: batch size 1 and methods with a practical mode only; leave the others out")
    devices = [device for device, backend in _KERNELS_OF.items() if backend in block.backends]
    for device, shape, dtype, threads, context in product(
        devices, block.shapes, block.dtypes, block.threads, block.contexts
    ):
        own = "graph" if device == "cuda" else "eager"
        others = [v for v in block.variants if v == "generate" or (v == "compile" and device == "cuda")]
        for method in block.methods:
            for variant in [own, *others] if kernel_of(method[0]) is Kernel.DENSE else [own]:
                clock = "wall" if device == "cpu" or variant != own else "graph"
                more = {"dtype": dtype, "variant": variant, "clock": clock, "context_tokens": context}
                yield from block.cases(shape, method, device, threads, **more)


def _check_names(block: _Block) -> None:
    axes: list[tuple[str, list[Any], tuple[str, ...]]] = [
        ("level", [block.level], LEVELS),
        ("backend", block.backends, BACKENDS),
        ("predictor", block.predictors, PREDICTORS),
        ("predictor_input", block.predictor_inputs, get_args(PredictorInput)),
    ]
    for kind, names, known in axes:
        for name in names:
            if name not in known:
                raise InputError(f"unknown speed {kind} {name!r}{did_you_mean(name, known)}")
    for method, params in block.methods:
        if kernel_of(method) is Kernel.GIVEN and params:
            raise InputError(f"method {GIVEN!r} of a speed case has no parameters: leave out {', '.join(params)}")
    if block.level != "decode" and "block" in block.predictor_inputs:
        raise InputError(f"predictor_input block of level {block.level}: a layer alone has none; use level decode")
    if "block" in block.predictor_inputs and "gated" not in block.predictors:
        raise InputError(
            f"predictor_inputs block of a speed block with predictors {', '.join(block.predictors)}: only gated ones read it; "
            "name gated too"
        )
    for sparsity in block.sparsities:
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise InputError(f"sparsity {sparsity!r} of a speed case: must be a number in [0, 1)")


def _thread_count(count: int | str) -> int:
    limit = default_threads()
    if count == "all":
        return limit
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= limit:
        raise InputError(f"threads {count!r} of a speed case: must be 1 to {limit}, the CPUs of this process, or all")
    return count
