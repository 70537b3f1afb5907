"""Times of decode steps: CUDA graphs and events on a GPU, the wall clock on a CPU; the methods of a model interleaved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from suite.speed.cases import Row, SpeedCase

if TYPE_CHECKING:
    from torch import nn

    from suite.decoding.step import DecodeModel, Mlp
    from suite.modeling.decode import DecodeKernels
    from suite.speed.decode import Timed

_ROUNDS, _ROUND_STEPS, _COUNTED_STEPS = 10, 12, 12


def device_facts(case: SpeedCase) -> Row:
    """Name of the device and its driver."""
    if case.device == "cuda":
        from suite.speed.gpu import driver_version

        return {"device_name": torch.cuda.get_device_name(), "driver_version": driver_version()}
    from suite.speed.timing import device_name

    return {"device_name": device_name(), "driver_version": ""}


def prepare(
    case: SpeedCase, decode: DecodeModel, mlp: Mlp, kernels: DecodeKernels | None, start: tuple[int, int]
) -> Timed:
    """Warm up, count what is kept, and capture graphs on a GPU."""
    from suite.speed.decode import Timed

    inputs: list[Tensor] = []

    def watching(layer: int, x: Tensor) -> Tensor:
        inputs.append(x.clone())
        return mlp(layer, x)

    layers = range(len(decode.mlps))
    kept = []
    decode.rewind(*start)
    for _ in range(_COUNTED_STEPS):
        inputs.clear()
        decode.step(watching)
        if kernels is not None:
            kept.append(float(kernels.kept(layers, 1).double().mean()) / case.d_ff)
    realised = 1.0 - float(np.mean(kept)) if kept else 0.0

    def step() -> None:
        decode.step(mlp)

    parts: dict[str, Callable[[], None]] = {
        name: partial(_part, decode, mlp, name, inputs) for name in ("attention", "MLP", "head")
    }
    if case.device != "cuda":
        return Timed(case, step, parts, realised, keep=[inputs])
    begin = time.perf_counter()
    from suite.decoding.graphs import captured

    graphs = {name: captured(run) for name, run in (parts | {"step": step}).items()}
    capture_s = time.perf_counter() - begin
    replays: dict[str, Callable[[], None]] = {name: graphs[name].replay for name in parts}
    return Timed(case, graphs["step"].replay, replays, realised, capture_s, [graphs, inputs, kernels, mlp])


@torch.no_grad()
def _part(decode: DecodeModel, mlp: Mlp, name: str, inputs: Sequence[Tensor]) -> None:
    """One part of a step alone; what attention writes at the present position, the next step overwrites."""
    if name == "head":
        decode.parts.next_token(inputs[-1], decode.head)
        return
    for layer, x in enumerate(inputs):
        if name == "MLP":
            mlp(layer, x)
        else:
            decode.attentions[layer](x, decode.position, decode.parts)


def time_all(
    decode: DecodeModel, timed: Sequence[Timed], start: tuple[int, int], tell: Callable[[str], None]
) -> Callable[[], float]:
    """Time 120 steps of every case, 12 a round, in an order that rotates; returns the read bandwidth measured between."""
    cuda = decode.device.type == "cuda"
    measure = _gpu_bandwidth() if cuda else _cpu_bandwidth(timed)
    clock = _event_times if cuda else _wall_times
    for round_ in range(_ROUNDS if timed else 0):
        shift = round_ % len(timed)
        for entry in [*timed[shift:], *timed[:shift]]:
            decode.rewind(*start)
            entry.run()  # the caches belong to another case
            entry.samples += clock(entry.run, _ROUND_STEPS)
            for name, part in entry.parts.items():
                entry.part_samples.setdefault(name, []).extend(clock(part, 3)[1:])
        measure()
        if round_ % 5 == 4:
            tell(f"round {round_ + 1}")
    return measure


def _event_times(run: Callable[[], None], n: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in pairwise(events)]


def _wall_times(run: Callable[[], None], n: int) -> list[float]:
    found = []
    for _ in range(n):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def _gpu_bandwidth() -> Callable[[], float]:
    from suite.speed.gpu_timing import ReadBandwidth

    reader = ReadBandwidth()

    def measure() -> float:
        reader.measure(3)
        return reader.bytes_per_s

    return measure


def _cpu_bandwidth(timed: Sequence[Timed]) -> Callable[[], float]:
    from suite.speed.timing import ReadBandwidth

    reader = ReadBandwidth(timed[0].case.threads if timed else 1)

    def measure() -> float:
        reader.measure()
        return reader.bytes_per_s

    return measure


def numbers(entry: Timed, decode: DecodeModel, context: int, bandwidth: Callable[[], float]) -> Row:
    """What was measured, as columns."""
    from suite.speed.decode import token_bytes

    needed = token_bytes(entry.case, decode, context, entry.realised)
    row = times(entry.samples) | {
        "sparsity_realized": entry.realised,
        "mlp_share": float(np.median(entry.part_samples["MLP"]) / np.median(entry.samples)),
        "phases": phase_rows(entry),
        "capture_s": entry.capture_s,
        "bytes_read_mib": needed / 2**20,
        "read_bandwidth_gb_s": bandwidth() / 1e9,
        "efficiency": needed / (float(np.median(entry.samples)) * bandwidth()),
    }
    if entry.case.device == "cuda":
        row["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def phase_rows(entry: Timed) -> list[Row]:
    """Microseconds of each part of a step; the rest is norms, additions, embedding and what lies between the parts."""
    rows: list[Row] = []
    for name, samples in entry.part_samples.items():
        low, median, high = (float(q) * 1e6 for q in np.percentile(samples, [5, 50, 95]))
        rows.append({"phase": name, "us_median": median, "us_q05": low, "us_q95": high})
    rest = float(np.median(entry.samples)) * 1e6 - math.fsum(float(str(row["us_median"])) for row in rows)
    return [*rows, {"phase": "rest", "us_median": max(0.0, rest), "us_q05": None, "us_q95": None}]


def times(samples: Sequence[float]) -> Row:
    """Quartiles of the time of a token, and tokens per second at the median."""
    from suite.speed.timing import time_columns

    return time_columns(samples) | {"tokens_per_s": 1 / float(np.median(samples))}


class _Stamps:
    """Streamer of `generate`: when each token reached the host."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _tokens: Any) -> None:
        """One token."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """No more."""


def generate_row(case: SpeedCase, model: nn.Module, prompt: Tensor, n_tokens: int) -> Row:
    """Dense by transformers' own generate: dynamic cache, or (``compile``) a static one, which it compiles on a GPU."""
    own: Any = model
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": n_tokens, "max_new_tokens": n_tokens}
    options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    if case.variant == "compile":
        options["cache_implementation"] = "static"
    begin = time.perf_counter()
    with torch.inference_mode():
        short = {} if case.variant == "compile" else {"min_new_tokens": 4, "max_new_tokens": 4}
        own.generate(prompt, **(options | short))  # what is compiled is compiled for this length of the cache
        jit_s = time.perf_counter() - begin
        samples: list[float] = []
        for _ in range(math.ceil(100 / (n_tokens - 2))):
            stamps = _Stamps()
            own.generate(prompt, streamer=stamps, **options)
            samples += list(np.diff(stamps.at[2:]))  # the prompt, and the prefill's token
    row = times(samples) | {"check": "passed", "jit_s": jit_s if case.variant == "compile" else None}
    return row | {"sparsity_realized": 0.0}
