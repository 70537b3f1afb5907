"""Twins of the functions of ``vectors`` for Numba's CUDA simulator; see ``simulated``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.gpu.ptx.dtypes import elements
from kernels_numba.gpu.ptx.simulated import (  # noqa: F401  kernels reach every device function through this module
    divide,
    exp2,
    launch_dependents,
    load16,
    load_f32,
    load_i32,
    make_load_narrow,
    make_store_narrow,
    make_zeros,
    narrow,
    prefetch,
    shared_load_f32,
    shared_load_i32,
    shared_store_f32,
    shared_store_i32,
    store_f32,
    widen,
)
from kernels_numba.gpu.ptx.simulated_warp import (  # noqa: F401
    all_lanes,
    ballot,
    device_function,
    lane_of,
    lane_xor,
    match_any,
    sync_warp,
    thread_index,
)
from kernels_numba.gpu.ptx.simulator import shared_memory, syncthreads, view  # noqa: F401


def add_i64(address: int, value: int) -> None:
    """One thread of one block at a time."""
    view(address, ctypes.c_int64)[0] += int(value)


def atomic_add_acq_rel(address: int, value: int) -> int:
    """Blocks run one after another."""
    place = view(address, ctypes.c_int32)
    old = int(place[0])
    place[0] = old + int(value)
    return old


def _row(words: tuple[int, ...], dtype: str) -> np.ndarray:
    return widen(np.array(words, np.uint32).tobytes(), dtype)


def make_piece_widen(dtype: str) -> Callable[..., tuple[Any, ...]]:
    """As in ``vectors``."""
    return lambda words: tuple(_row(words, dtype))


def make_piece_store(dtype: str) -> Callable[..., None]:
    """As in ``vectors``."""
    store, size = make_store_narrow(dtype), 16 // elements(dtype)

    def piece_store(address: int, values: tuple[Any, ...]) -> None:
        for i, value in enumerate(values):
            store(address + i * size, value)

    return piece_store


def make_piece_dot(dtype: str, n: int) -> Callable[..., tuple[Any, ...]]:
    """As in ``vectors``."""

    def piece_dot(words: tuple[int, ...], vectors: tuple[Any, ...]) -> tuple[Any, ...]:
        with np.errstate(all="ignore"):
            return tuple(np.array(vectors, np.float32).reshape(n, -1) @ _row(words, dtype))

    return piece_dot


def make_piece_add(dtype: str, n: int) -> Callable[..., tuple[Any, ...]]:
    """As in ``vectors``."""

    def piece_add(words: tuple[int, ...], factors: tuple[Any, ...], total: tuple[Any, ...]) -> tuple[Any, ...]:
        with np.errstate(all="ignore"):
            sums = np.array(total, np.float32).reshape(n, -1) + np.outer(factors, _row(words, dtype))
        return tuple(sums.astype(np.float32).ravel())

    return piece_add


def make_shared_floats(n_rows: int, n: int, stride: int) -> tuple[Callable[..., Any], Callable[..., None]]:
    """As in ``vectors``."""
    places = [row * stride + e * 4 for row in range(n_rows) for e in range(n)]

    def load(address: int) -> tuple[Any, ...]:
        return tuple(shared_load_f32(address + place) for place in places)

    def store(address: int, values: tuple[Any, ...]) -> None:
        for place, value in zip(places, values, strict=True):
            shared_store_f32(address + place, value)

    return load, store


def make_lanes_total(n: int, begin: int, end: int) -> Callable[..., tuple[Any, ...]]:
    """As in ``vectors``."""
    mask = end - begin  # the bits that may differ

    def lanes_total(values: tuple[Any, ...]) -> tuple[Any, ...]:
        lanes, lane = all_lanes(values), thread_index() & 31
        mine = [lanes[other] for other in range(32) if other & ~mask == lane & ~mask]
        with np.errstate(all="ignore"):
            return tuple(np.float32(sum(one[i] for one in mine)) for i in range(n))

    return lanes_total


def make_pieces_add(_dtype: str) -> Callable[..., tuple[Any, ...]]:
    """As in ``vectors``."""
    return lambda a, b: tuple(np.array(a, np.float32) + np.array(b, np.float32))


def make_pieces_scale(_dtype: str, by: float) -> Callable[..., tuple[Any, ...]]:
    """As in ``vectors``."""

    def scale(values: tuple[Any, ...], weights: tuple[Any, ...], factor: Any) -> tuple[Any, ...]:
        return tuple(
            np.array(values, np.float32) * np.float32(factor) * (np.array(weights, np.float32) + np.float32(by))
        )

    return scale


def make_pieces_round(dtype: str) -> Callable[..., tuple[Any, ...]]:
    """As in ``vectors``."""

    def rounded(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(widen(narrow(value, dtype), dtype)[0] for value in values)

    return rounded


def make_square_sum(_dtype: str) -> Callable[..., Any]:
    """As in ``vectors``."""
    return lambda values: np.float32(np.square(np.array(values, np.float32)).sum())
