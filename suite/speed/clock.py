"""Clocks of a CPU and a GPU, subjects timed interleaved, and the read bandwidth that their times are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

_MIN_BUFFER = 128 << 20  # of a CPU's reads
_CUDA_BUFFER = 4 << 30

Clock = Callable[[Callable[[], object], int], list[float]]  # (run, n) -> seconds of n calls


def wall_times(run: Callable[[], object], n: int) -> list[float]:
    """Seconds of each of n calls that return when they are done."""
    found = []
    for _ in range(n):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def event_times(run: Callable[[], object], n: int) -> list[float]:
    """Seconds between CUDA events around each of n calls; waits for the device once, at the end."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in pairwise(events)]


def last_level_cache_bytes() -> int:
    """Size of the largest cache of CPU 0; 64 MiB where the system does not say."""
    found = [64 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            found.append(int(text[:-1]) << 10)
        elif text.endswith("M"):
            found.append(int(text[:-1]) << 20)
    return max(found[1:] or found)


class ReadBandwidth:
    """The ceiling: the fastest of some kernels that only read a buffer, sampled between the rounds.

    The buffer is larger than any cache, so that a sample also evicts what lies there.

    Parameters
    ----------
    reads : callables, each of which reads the whole buffer
    n_bytes : size of the buffer
    clock : of the device
    """

    def __init__(self, reads: Sequence[Callable[[], object]], n_bytes: int, clock: Clock) -> None:
        self._reads, self._n_bytes, self._clock = reads, n_bytes, clock
        self._samples: list[list[float]] = [[] for _ in reads]
        for read in reads:
            read()  # compiles or loads it

    def measure(self) -> None:
        """Add a sample of each kernel."""
        for read, samples in zip(self._reads, self._samples, strict=True):
            samples += [self._n_bytes / seconds for seconds in self._clock(read, 1)]

    @property
    def bytes_per_s(self) -> float:
        """Median of the faster kernel's samples."""
        return max(float(np.median(samples)) for samples in self._samples)


def cpu_bandwidth(threads: int) -> ReadBandwidth:
    """Numba threads that sum a buffer of several times the last-level cache."""
    import numba

    from kernels_numba.cpu_kernels import read_all

    buffer = np.ones(max(4 * last_level_cache_bytes(), _MIN_BUFFER) // 4, dtype=np.float32)
    sums = np.zeros(threads, dtype=np.float32)

    def read() -> None:
        numba.set_num_threads(threads)
        read_all(buffer, sums)

    return ReadBandwidth([read], buffer.nbytes, wall_times)


def cuda_bandwidth() -> ReadBandwidth:
    """Two of torch's kernels over 4 GiB: a sum (fp32) and a matrix times a vector (bf16).

    On one H200 4.07 to 4.38 TB/s by the sum alone, below what a dense layer read at (4.40), so that an efficiency could
    pass 1.
    """
    import torch
    from torch.nn import functional

    numbers = torch.ones(_CUDA_BUFFER // 4, dtype=torch.float32, device="cuda")
    matrix = numbers.view(torch.bfloat16).view(-1, 16384)
    vector = torch.ones(1, 16384, dtype=torch.bfloat16, device="cuda")

    def twice(run: Callable[[], object], n: int) -> list[float]:
        run()  # the device is busy when the first event comes: no launch is in the time
        return event_times(run, n)

    return ReadBandwidth([numbers.sum, partial(functional.linear, vector, matrix)], _CUDA_BUFFER, twice)


def clock_rate() -> float:
    """Cycles of an SM's clock in a microsecond, from two spins of known length."""
    import torch

    milliseconds = []
    torch.cuda._sleep(1_000)  # loads the kernel: in the first run its loading made a rate below 0
    for cycles in (4_000_000, 20_000_000):
        milliseconds += [1e3 * seconds for seconds in event_times(partial(torch.cuda._sleep, cycles), 1)]
    return 16_000.0 / (milliseconds[1] - milliseconds[0])


@dataclass(frozen=True)
class Rounds:
    """How often subjects are sampled: as often as the budget lasts, within bounds.

    Parameters
    ----------
    least, most : rounds; with too few none of the figures would mean anything
    budget_s : seconds for each subject
    """

    least: int
    most: int
    budget_s: float = 0.0


def time_interleaved(
    samples: Sequence[Callable[[], list[float]]],
    rounds: Rounds,
    between: Callable[[], None],
    tell: Callable[[str], None],
) -> list[list[float]]:
    """Sample every subject once a round, in an order that rotates; seconds of each.

    Parameters
    ----------
    samples : callables that time a subject for one round
    between : called after each round
    """
    found: list[list[float]] = [[] for _ in samples]
    end = time.perf_counter() + rounds.budget_s * len(samples)
    number = 0
    while number < rounds.most and (number < rounds.least or time.perf_counter() < end):
        for index in range(len(samples)):
            subject = (index + number) % len(samples)
            found[subject] += samples[subject]()
        between()
        number += 1
        tell(f"round {number}")
    return found
