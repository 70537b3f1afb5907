"""Speed cases: what is timed, in which groups, and on which backend. Loads no torch until a group runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

from suite import schema
from suite.decoding.shapes import shape_of
from suite.devices import DTYPE_BYTES
from suite.errors import InputError
from suite.methods.cost import low_rank_weights, read_share
from suite.registry import did_you_mean, method_class

if TYPE_CHECKING:
    import pandas as pd

    from suite.modeling.modes import ThresholdState

Row = dict[str, object]
Progress = Callable[[str], None]

# Where a case's backend runs: the one table that dispatches. A module has unavailable() -> reason or "", and
# time_group(cases, seed=, progress=) -> rows of schema.SPEED without run_id and cell_id, one a case, in order.
DEVICES = {"cpu": "suite.speed.cpu", "cuda": "suite.speed.gpu"}
MODES = {"dense": "none", "cats": "practical", "m-countdown": "practical", "d-countdown": "practical", "given": "ideal"}


@dataclass(frozen=True, kw_only=True)
class SpeedCase:
    """One timed case: a method at one sparsity on one layer shape and backend.

    Parameters
    ----------
    level : "op" (the down projection alone), "layer" (one gated MLP) or "decode" (a token of a whole model)
    model_shape : name of the shape; d_model, d_ff and activation are its values
    method : "dense", "cats", "m-countdown", "given" (a given active set: what a predictor method runs), ...
    mode : "none" for dense, "practical" for thresholds, "ideal" for a given set (exactly k kept)
    backend : "torch" (dense only), "numba-cpu" or "numba-cuda"
    device : "cpu" or "cuda"
    threads : CPU threads; 0 on a GPU
    variant : "eager"; of dense on a GPU "compile"; of a CUDA kernel "no-overlap" (without programmatic dependent launch),
        of a method that selects by a dense projection "deterministic" (sums in one order), or "trace" (with the clock
        written at every phase)
    clock : "wall" on a CPU, "graph" or "event" on a GPU
    context_tokens : tokens in the cache, of level "decode" only
    """

    level: str = "layer"
    model_shape: str
    d_model: int
    d_ff: int
    activation: str = "silu"
    dtype: str = "float32"
    method: str
    mode: str
    sparsity: float = 0.0
    backend: str
    device: str = "cpu"
    variant: str = "eager"
    batch_size: int = 1
    threads: int = 1
    clock: str = "wall"
    cache: str = "cold"
    rank: int | None = None
    context_tokens: int | None = None

    def key_fields(self) -> dict[str, Any]:
        """Everything about the case that decides its number, as plain values."""
        return asdict(self)

    @property
    def group(self) -> str:
        """Cases of one group are timed interleaved in one go and always run again together."""
        shape = f"{self.model_shape}-{self.d_model}x{self.d_ff}-{self.activation}"
        shape = f"decode-{shape}" if self.level == "decode" else shape
        return f"{self.device}-{shape}-{self.dtype}-b{self.batch_size}-t{self.threads}"

    @property
    def label(self) -> str:
        """Short name for progress and logs."""
        sparsity = "" if self.method == "dense" else f" s={self.sparsity:g}"
        return f"{self.model_shape} {self.level} {self.method}{sparsity} {self.backend}"


States = Mapping[SpeedCase, "ThresholdState"]


def default_threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def needed_bytes(case: SpeedCase, realised: float) -> float:
    """Bytes of weights a case has to read for one token at a realised sparsity (activations are left out).

    dense 3hd; first-projection methods (3 - 2s)hd; given 3(1 - s)hd, with a predictor of rank r plus r(h + d);
    the down projection alone (1 - s)hd, all times the bytes of a weight; h = d_model, d = d_ff.
    """
    weights = case.d_model * case.d_ff
    if case.level == "op":
        elements = weights * (1.0 - realised)
    else:
        first = None if case.method == "given" else method_class(case.method).first_projection
        elements = 3 * weights * read_share(first, realised)
    predictor = low_rank_weights(case.rank, case.d_model, case.d_ff) if case.rank else 0
    return (elements + predictor) * DTYPE_BYTES[case.dtype]


def empty_row(case: SpeedCase) -> Row:
    """Row of schema.SPEED with the case's own columns filled; what is not known is None, an empty cell."""
    row: Row = {column: None for column in schema.SPEED.names if column not in ("run_id", "cell_id")}
    row.update({name: value for name, value in case.key_fields().items() if name in row})
    row["sparsity_target"] = case.sparsity
    if case.device != "cpu":
        row["threads"] = None
    return row


def skipped_row(case: SpeedCase, reason: str) -> Row:
    """Row of a case that cannot run here: status skipped, the reason, no number."""
    return empty_row(case) | {"check": "skipped", "status": "skipped", "reason": reason}


def make_cases(
    shapes: Iterable[str],
    methods: Iterable[str],
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
) -> list[SpeedCase]:
    """All cases of a matrix block, those of one group side by side; combinations that mean nothing are left out.

    ``torch`` runs dense only and once, whatever the sparsities; the other backends run the sparse methods. The CPU
    knows the clock ``wall`` and the variant ``eager`` only, the GPU every other clock (``wall`` becomes ``graph``);
    the variant ``compile`` is of dense on the GPU, in a graph, ``no-overlap`` and ``trace`` of the CUDA kernels,
    ``deterministic`` of those that have another order of sums without it.

    Raises
    ------
    InputError
        Unknown shape, method, level or backend, sparsity outside [0, 1), a case named twice.
    """
    methods, sparsities, backends, clocks = list(methods), list(sparsities), list(backends), list(clocks)
    _check_names(level, methods, sparsities, backends)
    if level == "decode":
        axes = (list(dtypes), list(batch_sizes), list(threads), list(variants), list(contexts))
        return _decode_cases(list(shapes), methods, sparsities, backends, *axes)
    gpu = "numba-cuda" in backends
    devices = [d for d, wanted in (("cpu", "numba-cpu" in backends or not gpu), ("cuda", gpu)) if wanted]
    cases: list[SpeedCase] = []
    for device, name, dtype, batch, count in product(devices, shapes, dtypes, batch_sizes, threads):
        shape = shape_of(name)
        own_clocks = ["wall"] if device == "cpu" else [c if c != "wall" else "graph" for c in clocks]
        own_variants = ["eager"] if device == "cpu" else list(variants)
        for backend, method, variant, clock in product(backends, methods, own_variants, own_clocks):
            if not _exists(level, device, backend, method, variant, clock):
                continue
            cases += [
                SpeedCase(
                    level=level,
                    model_shape=name,
                    d_model=shape.d_model,
                    d_ff=shape.d_ff,
                    activation=shape.activation,
                    dtype=dtype,
                    method=method,
                    mode=MODES[method],
                    sparsity=float(sparsity),
                    backend=backend,
                    device=device,
                    variant=variant,
                    batch_size=batch,
                    threads=_thread_count(count) if device == "cpu" else 0,
                    clock=clock,
                    rank=512 if method == "d-countdown" else None,
                )
                for sparsity in ([0.0] if method == "dense" else sparsities)
            ]
    if len(set(cases)) != len(cases):
        twice = next(case for case in cases if cases.count(case) > 1)
        raise InputError(f"speed case {twice.label} is named twice: remove one")
    return sorted(cases, key=lambda case: list(dict.fromkeys(c.group for c in cases)).index(case.group))


def _exists(level: str, device: str, backend: str, method: str, variant: str, clock: str) -> bool:
    """Whether a combination means something."""
    if backend == ("numba-cuda" if device == "cpu" else "numba-cpu") or (method == "dense") != (backend == "torch"):
        return False
    if level == "op" and method not in ("dense", "given"):
        return False
    if variant == "compile":  # torch.compile competes for the fastest dense row alone
        return method == "dense" and clock == "graph"
    if variant == "deterministic":
        return method in ("cats", "m-countdown")
    return variant == "eager" or method != "dense"


def _decode_cases(
    shapes: list[str],
    methods: list[str],
    sparsities: list[float],
    backends: list[str],
    dtypes: list[str],
    batch_sizes: list[int],
    threads: list[int | str],
    variants: list[str],
    contexts: list[int],
) -> list[SpeedCase]:
    """Whole models: sparse methods in the own loop only (a graph on the GPU), dense also by the other variants."""
    if batch_sizes != [1] or "given" in methods:
        raise InputError("level decode: batch size 1 and methods with a practical mode only; leave the others out")
    devices = [d for d, backend in (("cpu", "numba-cpu"), ("cuda", "numba-cuda")) if backend in backends]
    cases = []
    for device, name, dtype, count, context in product(devices, shapes, dtypes, threads, contexts):
        shape, own = shape_of(name), "graph" if device == "cuda" else "eager"
        others = [v for v in variants if v == "generate" or (v == "compile" and device == "cuda")]
        for method in methods:
            dense = method == "dense"
            cases += [
                SpeedCase(
                    level="decode",
                    model_shape=name,
                    d_model=shape.d_model,
                    d_ff=shape.d_ff,
                    activation=shape.activation,
                    dtype=dtype,
                    method=method,
                    mode=MODES[method],
                    sparsity=float(sparsity),
                    backend="torch" if dense else f"numba-{device}",
                    device=device,
                    variant=variant,
                    threads=_thread_count(count) if device == "cpu" else 0,
                    clock="wall" if device == "cpu" or variant != own else "graph",
                    cache="cold",
                    rank=min(512, shape.d_model // 2) if method == "d-countdown" else None,
                    context_tokens=context,
                )
                for variant in ([own, *others] if dense else [own])
                for sparsity in ([0.0] if dense else sparsities)
            ]
    return sorted(cases, key=lambda case: list(dict.fromkeys(c.group for c in cases)).index(case.group))


def _check_names(level: str, methods: list[str], sparsities: list[float], backends: list[str]) -> None:
    known = {"level": ["op", "layer", "decode"], "method": list(MODES), "backend": ["torch", "numba-cpu", "numba-cuda"]}
    for kind, names in (("level", [level]), ("method", methods), ("backend", backends)):
        for name in names:
            if name not in known[kind]:
                raise InputError(f"unknown speed {kind} {name!r}{did_you_mean(name, known[kind])}")
    for sparsity in sparsities:
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise InputError(f"sparsity {sparsity!r} of a speed case: must be a number in [0, 1)")


def _thread_count(count: int | str) -> int:
    limit = default_threads()
    if count == "all":
        return limit
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= limit:
        raise InputError(f"threads {count!r} of a speed case: must be 1 to {limit}, the CPUs of this process, or all")
    return count


def run_group(
    cases: Sequence[SpeedCase], *, seed: int = 0, progress: Progress | None = None, states: States | None = None
) -> list[Row]:
    """Check and time the cases of one group, interleaved round by round.

    Parameters
    ----------
    cases : cases with one ``group``
    seed : of weights and inputs
    progress : called with the label of what is going on; None shows a bar for what takes over 3 s
    states : fits of decode cases of a model with real weights

    Returns
    -------
    list of dict
        One row of ``schema.SPEED`` (without run_id, cell_id) a case, in order. A case whose check failed has status
        ``failed`` and no time; one that cannot run here has status ``skipped`` and the reason.

    Raises
    ------
    InputError
        Cases of several groups.
    """
    if not cases:
        return []
    groups = sorted({case.group for case in cases})
    if len(groups) > 1:
        raise InputError(f"cases of {len(groups)} groups ({', '.join(groups)}): run each group on its own")
    if cases[0].level == "decode":
        from suite.speed.decode import time_group

        return time_group(cases, seed=seed, progress=progress, states=states)
    reason, module = _backend(cases[0].device)
    if reason:
        return [skipped_row(case, reason) for case in cases]
    rows: list[Row] = module.time_group(cases, seed=seed, progress=progress)
    return rows


def _backend(device: str) -> tuple[str, Any]:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False", None
    name = DEVICES[device]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: install the extra 'cuda'", None
    return module.unavailable(), module


def benchmark(
    shapes: Sequence[str] = ("embedded",),
    methods: Sequence[str] = ("dense", "cats", "m-countdown", "given"),
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9),
    *,
    level: str = "layer",
    dtype: str = "float32",
    backends: Sequence[str] = ("torch", "numba-cpu"),
    threads: int | str = "all",
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Time one gated MLP layer (or its down projection, ``level="op"``) and return rows with speed.csv's columns.

    >>> benchmark(["llama-3.1-8b"], sparsities=[0.9])  # doctest: +SKIP

    Raises
    ------
    InputError
        As `make_cases`.
    """
    import pandas as pd

    cases = make_cases(shapes, methods, sparsities, level=level, dtypes=[dtype], backends=backends, threads=[threads])
    rows: list[Row] = []
    for _, group in groupby(cases, key=lambda case: case.group):
        rows += run_group(list(group), seed=seed, progress=progress)
    columns = [column for column in schema.SPEED.names if column not in ("run_id", "cell_id")]
    return pd.DataFrame(rows, columns=columns)
