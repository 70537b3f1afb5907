"""Interleaved wall-clock timing with cold caches, and the read bandwidth it is held against."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray

from kernels_numba import cpu_kernels
from suite.speed.cases import Row, SpeedCase, empty_row, needed_bytes

# torch's and numba's OpenMP workers spin for some milliseconds after a region and would share cores with the next case.
_SETTLE_S = 0.01
_MIN_BUFFER = 128 << 20
_MIN_ROUNDS = 5
_MAX_ROUNDS = 50
# Quartiles of undisturbed rounds lie within 1.3x of each other (GPU: 1.01); another process on the same cores moves them apart.
_MAX_SPREAD = 1.5
DISTURBED = f"disturbed: quartiles of the rounds lie more than {_MAX_SPREAD:g}x apart; time it again on a quiet machine"


def device_name() -> str:
    """Model of the CPU, as the kernel of the operating system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
    """Reads a buffer several times the last-level cache: evicts it, and measures the ceiling with the same threads."""

    def __init__(self, threads: int) -> None:
        size = max(4 * last_level_cache_bytes(), _MIN_BUFFER)
        self._buffer = np.ones(size // 4, dtype=np.float32)
        self._sums = np.zeros(threads, dtype=np.float32)
        self._threads = threads
        self.samples: list[float] = []

    def evict(self) -> None:
        """Read the buffer, so that nothing of the case to come is left in a cache."""
        numba.set_num_threads(self._threads)
        cpu_kernels.read_all(self._buffer, self._sums)

    def measure(self) -> None:
        """Add one sample, in bytes per second."""
        numba.set_num_threads(self._threads)
        start = time.perf_counter()
        cpu_kernels.read_all(self._buffer, self._sums)
        self.samples.append(self._buffer.nbytes / (time.perf_counter() - start))

    @property
    def bytes_per_s(self) -> float:
        """Median of the samples, which were taken between the cases'."""
        return float(np.median(self.samples))


@dataclass
class Timed:
    """A case that passed its check, and its samples.

    Parameters
    ----------
    run : calls the case once on each of ``n_layers`` layers with distinct weights and inputs
    realised : sparsity of those inputs, mean over the layers
    """

    case: SpeedCase
    run: Callable[[], None]
    n_layers: int
    realised: float
    samples: list[float] = field(default_factory=list)  # seconds a layer


def time_interleaved(
    timed: Sequence[Timed], bandwidth: ReadBandwidth, *, budget_s: float, progress: Callable[[str], None]
) -> int:
    """Time every case once a round, in an order that rotates, until the budget is spent; returns the rounds.

    Before each sample the caches are evicted and the other library's workers left to settle. At least 5 rounds (or none
    of the figures would mean anything), at most 50.
    """
    bandwidth.evict()
    end = time.perf_counter() + budget_s
    rounds = 0
    while rounds < _MAX_ROUNDS and (rounds < _MIN_ROUNDS or time.perf_counter() < end):
        shift = rounds % max(1, len(timed))
        for entry in [*timed[shift:], *timed[:shift]]:
            bandwidth.evict()
            time.sleep(_SETTLE_S)
            start = time.perf_counter()
            entry.run()
            entry.samples.append((time.perf_counter() - start) / entry.n_layers)
            time.sleep(_SETTLE_S)
            bandwidth.measure()
        rounds += 1
        progress(f"round {rounds}")
    return rounds


def time_columns(samples: Sequence[float]) -> Row:
    """Columns of a time, on any device and level: its quartiles, and in ``reason`` that it was disturbed.

    Parameters
    ----------
    samples : seconds, one a round
    """
    micro: NDArray[np.float64] = np.asarray(samples) * 1e6
    q25, median, q75 = (float(q) for q in np.percentile(micro, [25, 50, 75]))
    return {
        "rounds": len(micro),
        "latency_us_median": median,
        "latency_us_q25": q25,
        "latency_us_q75": q75,
        "latency_us_min": float(micro.min()),
        "status": "ok",
        "reason": DISTURBED if q75 > _MAX_SPREAD * q25 else "",
    }


def timed_row(entry: Timed, bandwidth: ReadBandwidth) -> Row:
    """Row of a case that was checked and timed."""
    needed = needed_bytes(entry.case, entry.realised)
    return (
        empty_row(entry.case)
        | time_columns(entry.samples)
        | {
            "sparsity_realized": entry.realised,
            "bytes_read_mib": needed / 2**20,
            "read_bandwidth_gb_s": bandwidth.bytes_per_s / 1e9,
            "efficiency": needed / (float(np.median(entry.samples)) * bandwidth.bytes_per_s),
        }
    )
