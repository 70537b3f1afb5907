"""Twins of the functions of ``warp`` for Numba's CUDA simulator; see ``simulated``.

A warp is 32 neighbouring threads; its exchanges go through memory and barriers, so all threads of the block that work on
rows must reach them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.gpu.ptx.simulator import exchange, syncthreads, thread


def device_function(function: Any) -> Any:
    """Plain Python: only the kernel itself needs the simulator's decorator."""
    return function


def thread_index() -> int:
    """Number of this thread in its block."""
    return int(thread().threadIdx.x)


def all_lanes(value: Any) -> list[Any]:
    """Values of the 32 threads of this thread's warp."""
    tid = thread_index()
    exchange[tid] = value
    syncthreads()
    lanes = [exchange[(tid & ~31) + i] for i in range(32)]
    syncthreads()
    return lanes


def make_lanes_sum(n: int) -> Callable[..., Any]:
    """As in ``warp``."""
    width = 32 // (1 << (n - 1).bit_length())

    def lanes_sum(values: tuple[Any, ...]) -> Any:
        lanes, number = all_lanes(values), (thread_index() & 31) // width
        with np.errstate(all="ignore"):
            return np.float32(sum(lane[number] for lane in lanes)) if number < n else np.float32(0.0)

    return lanes_sum


def make_lanes_fold(width: int) -> Callable[..., Any]:
    """As in ``warp``."""

    def lanes_fold(value: Any) -> Any:
        lanes, first = all_lanes(value), (thread_index() & 31) // width * width
        with np.errstate(all="ignore"):
            return np.float32(sum(lanes[first : first + width]))

    return lanes_fold


def make_lanes_spread(n: int, stride: int) -> Callable[..., Any]:
    """As in ``warp``."""

    def lanes_spread(value: Any) -> tuple[Any, ...]:
        lanes = all_lanes(value)
        return tuple(lanes[i * stride] for i in range(n))

    return lanes_spread


def lane_xor(value: Any, mask: int) -> Any:
    """As in ``warp``."""
    return all_lanes(value)[(thread_index() & 31) ^ mask]


def lane_of(value: int, lane: int) -> int:
    """As in ``warp``."""
    return int(all_lanes(value)[lane & 31])


def ballot(predicate: bool) -> int:
    """As in ``warp``."""
    return sum(1 << i for i, lane in enumerate(all_lanes(bool(predicate))) if lane)


def match_any(value: int) -> int:
    """As in ``warp``."""
    return sum(1 << i for i, lane in enumerate(all_lanes(int(value))) if lane == int(value))


def sync_warp() -> None:
    """As in ``warp``."""
    syncthreads()
