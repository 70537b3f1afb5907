"""Timing of CUDA cases: graphs and launches over layers with distinct weights, interleaved; bandwidth; phases of a trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from suite.decoding.graphs import captured
from suite.speed.cases import Progress, Row, SpeedCase, needed_bytes
from suite.speed.timing import time_columns

if TYPE_CHECKING:
    from suite.speed.gpu import Bound, LayerData

_ROUNDS = 50
_BANDWIDTH_BYTES = 4 << 30


@dataclass
class Timed:
    """A case ready to be timed: ``run`` passes once over all layers."""

    case: SpeedCase
    run: Callable[[], None]
    realised: float
    keep: list[Any]
    capture_s: float | None
    launch_us: float
    samples: list[float] = field(default_factory=list)


def prepare(case: SpeedCase, bounds: Sequence[Bound], layers: Sequence[LayerData], realised: float) -> Timed:
    """Warm a case up on a stream of its own, measure the host time of its launches, and capture it unless timed by events."""
    outs = [torch.empty_like(layer.x) for layer in layers]

    calls = [
        bound.again(layer.x, out) if bound.again else partial(bound.call, layer.x, out)
        for bound, layer, out in zip(bounds, layers, outs, strict=True)
    ]

    def run() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        host = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            host.append((time.perf_counter() - start) / len(layers) * 1e6)
            torch.cuda.synchronize()
    launch_us = float(np.median(host))
    if case.clock != "graph":
        return Timed(case, run, realised, [bounds, outs], None, launch_us)
    start = time.perf_counter()
    graph = captured(run, warm_up=0)
    return Timed(case, graph.replay, realised, [bounds, outs, graph], time.perf_counter() - start, launch_us)


class ReadBandwidth:
    """The ceiling: the fastest of two of torch's kernels that only read, over 4 GiB, sampled between the rounds.

    A sum (fp32) and a matrix times a vector (bf16): on one H200 4.07 to 4.38 TB/s by the sum alone, below what a dense
    layer read at (4.40), so that an efficiency could pass 1.
    """

    def __init__(self) -> None:
        numbers = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device="cuda")
        matrix = numbers.view(torch.bfloat16).view(-1, 16384)
        vector = torch.ones(1, 16384, dtype=torch.bfloat16, device="cuda")
        self._reads: list[Callable[[], object]] = [numbers.sum, partial(functional.linear, vector, matrix)]
        self._samples: list[list[float]] = [[] for _ in self._reads]

    def measure(self, rounds: int) -> None:
        """Add samples of each kernel, in bytes per second."""
        for read, samples in zip(self._reads, self._samples, strict=True):
            read()
            for _ in range(rounds):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                read()
                end.record()
                end.synchronize()
                samples.append(_BANDWIDTH_BYTES / (begin.elapsed_time(end) * 1e-3))

    @property
    def bytes_per_s(self) -> float:
        """Median of the faster kernel's samples."""
        return max(float(np.median(samples)) for samples in self._samples)


def time_interleaved(timed: Sequence[Timed], n_layers: int, tell: Progress) -> float:
    """Time every case once a round, in an order that rotates; returns the read bandwidth measured in between."""
    bandwidth = ReadBandwidth()
    bandwidth.measure(10)
    for round_ in range(_ROUNDS):
        shift, events = round_ % len(timed), []
        for entry in [*timed[shift:], *timed[:shift]]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            entry.run()  # the sample before belongs to another case: its weights are what L2 holds now
            begin.record()
            entry.run()
            end.record()
            events.append((entry, begin, end))
        torch.cuda.synchronize()
        for entry, begin, end in events:
            entry.samples.append(begin.elapsed_time(end) * 1e-3 / n_layers)
        if round_ % 10 == 9:
            tell(f"round {round_ + 1}")
            bandwidth.measure(3)
    return bandwidth.bytes_per_s


def clock_rate() -> float:
    """Cycles of an SM's clock in a microsecond, from two spins of known length."""
    milliseconds = []
    torch.cuda._sleep(1_000)  # loads the kernel: in the first run its loading made a rate below 0
    for cycles in (4_000_000, 20_000_000):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return 16_000.0 / (milliseconds[1] - milliseconds[0])


def phase_rows(bounds: Sequence[Bound], cycles_per_us: float) -> list[Row]:
    """Rows of schema.PHASES (without cell_id) of a traced case: time of each phase over all blocks of all layers."""
    traces = [bound.layer.phases() for bound in bounds]
    rows: list[Row] = []
    for name in traces[0]:
        micro = torch.cat([trace[name] for trace in traces]).double().cpu().numpy() / cycles_per_us
        low, median, high = (float(q) for q in np.percentile(micro, [5, 50, 95]))
        rows.append({"phase": name, "us_median": median, "us_q05": low, "us_q95": high})
    return rows


def numbers_of(entry: Timed, bandwidth: float) -> Row:
    """Columns of a timed case; ``bandwidth`` in bytes per second."""
    needed = needed_bytes(entry.case, entry.realised)
    return time_columns(entry.samples) | {
        "sparsity_realized": entry.realised,
        "capture_s": entry.capture_s,
        "launch_us": entry.launch_us,
        "bytes_read_mib": needed / 2**20,
        "read_bandwidth_gb_s": bandwidth / 1e9,
        "efficiency": needed / (float(np.median(entry.samples)) * bandwidth),
    }
