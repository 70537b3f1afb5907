"""Twins of the functions of ``device`` for Numba's CUDA simulator, which has no PTX, no warps and no bf16.

Blocks run one after another: a wait for another block's arrival that has not happened yet raises.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels_numba.gpu.ptx.dtypes import elements
from kernels_numba.gpu.ptx.simulated_warp import (  # noqa: F401  kernels reach every device function through this module
    ballot,
    device_function,
    lane_of,
    lane_xor,
    make_lanes_fold,
    make_lanes_spread,
    make_lanes_sum,
    sync_warp,
)
from kernels_numba.gpu.ptx.simulator import meet, shared_memory, syncthreads, view  # noqa: F401

SPIN_LIMIT = 1  # blocks run one after another: a flag that is not up never will be


def make_barrier(threads: int) -> Callable[[], None]:
    """Of the first threads of the block."""
    return lambda: meet("rows", threads)


def _loader(kind: Any, convert: Callable[[Any], Any]) -> Callable[[int], Any]:
    def load(address: int) -> Any:
        return convert(view(address, kind)[0])

    return load


def _storer(kind: Any) -> Callable[[int, Any], None]:
    def store(address: int, value: Any) -> None:
        view(address, kind)[0] = float(value) if kind is ctypes.c_float else int(value)

    return store


shared_load_i32 = load_i32 = _loader(ctypes.c_int32, int)
shared_load_f32 = load_f32 = _loader(ctypes.c_float, np.float32)
shared_store_f32 = store_f32 = _storer(ctypes.c_float)


def shared_store_i32(address: int, value: int) -> None:
    """32 bits, wrapped as the machine does."""
    view(address, ctypes.c_uint32)[0] = int(value) & 0xFFFFFFFF


store_i32 = shared_store_i32


flag_store, flag_load = _storer(ctypes.c_int64), _loader(ctypes.c_int64, int)


def store_tagged_i32(address: int, value: int, tag: int) -> None:
    """Data and the number of the launch."""
    view(address, ctypes.c_uint32, 2)[:] = [int(value) & 0xFFFFFFFF, int(tag)]


def wait_tagged_i32(address: int, tag: int) -> int:
    """Data of this launch; blocks run one after another, so what is not there never will be."""
    value, found = view(address, ctypes.c_int32, 2)[:]
    if found != tag:
        raise RuntimeError(f"waits for a word of launch {tag}: the word there is of launch {found}")
    return int(value)


def store_tagged_f32(address: int, value: Any, tag: int) -> None:
    """As for an integer."""
    store_tagged_i32(address, int(np.float32(value).view(np.uint32)), tag)


def wait_tagged_f32(address: int, tag: int) -> Any:
    """As for an integer."""
    return np.int32(wait_tagged_i32(address, tag)).view(np.float32)


def prefetch(address: int) -> None:
    """Only the address is looked at."""
    view(address, ctypes.c_uint32)


def atomic_add(address: int, value: int) -> int:
    """The value before; one claiming thread of one block at a time. The first take a while: others must wait for claims."""
    before = load_i32(address)
    time.sleep(0.2 if before < 3 else 0)
    store_i32(address, before + value)
    return before


shared_tell, shared_tell_f32, shared_tell_i32 = store_tagged_i32, store_tagged_f32, shared_store_i32


def shared_wait(address: int, tag: int) -> int:
    """Data with this tag, which a thread of another warp writes as soon as it runs."""
    end = time.monotonic() + 5
    while view(address + 4, ctypes.c_int32)[0] != tag and time.monotonic() < end:
        time.sleep(0.0005)
    return wait_tagged_i32(address, tag)


def shared_wait_f32(address: int, tag: int) -> Any:
    """As for an integer."""
    return np.int32(shared_wait(address, tag)).view(np.float32)


def shared_wait_above(address: int, value: int) -> None:
    """Raises if nobody asks for a claim beyond the value."""
    end = time.monotonic() + 5
    while shared_load_i32(address) <= value:
        time.sleep(0.0005)
        if time.monotonic() > end:
            raise RuntimeError(f"nobody asks for a claim beyond {value}")


def make_wait_tagged(n: int) -> Callable[..., tuple[Any, ...]]:
    """As in ``device``: words of other warps of this block, which tell them as soon as they run."""
    return lambda address, limit, tag: tuple(
        shared_wait_f32(address + 8 * i, tag) if i < limit else np.float32(0.0) for i in range(n)
    )


def store_clock(address: int) -> None:
    """No clock here: writes 0."""
    view(address, ctypes.c_int64)[0] = 0


def exp2(x: Any) -> Any:
    """2 ** x in fp32."""
    with np.errstate(all="ignore"):
        return np.exp2(np.float32(x))


def divide(a: Any, b: Any) -> Any:
    """Quotient in fp32."""
    with np.errstate(all="ignore"):
        return np.float32(a) / np.float32(b)


def sqrt(x: Any) -> Any:
    """Root in fp32."""
    with np.errstate(all="ignore"):
        return np.sqrt(np.float32(x))


def popcount(value: int) -> int:
    """Set bits of the low 32."""
    return (int(value) & 0xFFFFFFFF).bit_count()


def copy_commit() -> None:
    """Nothing: copies are done at once."""


def copy4(destination: int, source: int) -> None:
    """One word, at once."""
    view(destination, ctypes.c_uint32)[0] = view(source, ctypes.c_uint32)[0]


launch_dependents = grid_dependency_wait = copy_commit


def make_copy_wait(_pending: int) -> Callable[[], None]:
    """Nothing to wait for."""
    return copy_commit


def make_copy(_hint: str) -> Callable[..., None]:
    """``copy(shared, global, size)``."""

    def copy(destination: int, source: int, size: int) -> None:
        target = view(destination, ctypes.c_uint32, 4)
        target[:] = view(source, ctypes.c_uint32, 4)[:] if size else [0] * 4

    return copy


def load16(address: int) -> tuple[int, ...]:
    """Four words."""
    return tuple(view(address, ctypes.c_uint32, 4)[:])


def shared_store16(address: int, words: tuple[int, ...]) -> None:
    """Store four words."""
    view(address, ctypes.c_uint32, 4)[:] = [int(w) for w in words]


def widen(raw: bytes, dtype: str) -> np.ndarray:
    """Stored elements in fp32."""
    if dtype == "float32":
        return np.frombuffer(raw, np.float32)
    if dtype == "float16":
        return np.frombuffer(raw, np.float16).astype(np.float32)
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _vector(address: int, dtype: str) -> np.ndarray:
    return widen(bytes(view(address, ctypes.c_uint32, 4)), dtype)


def make_rows_dot(
    dtype: str, n_rows: int, batch: int, chunks: int, row_stride: int, chunk_stride: int
) -> Callable[..., Any]:
    """As in ``device``."""

    def rows_dot(rows: int, x: int) -> tuple[Any, ...]:
        total = np.zeros((n_rows, batch), np.float32)
        for c in range(chunks):
            for r in range(n_rows):
                row = _vector(rows + r * row_stride + c * chunk_stride, dtype)
                for b in range(batch):
                    with np.errstate(all="ignore"):
                        total[r, b] += row @ _vector(x + (b * chunks + c) * chunk_stride, dtype)
        return tuple(total.ravel())

    return rows_dot


def make_rows_dot_f32(dtype: str, n_rows: int, batch: int, row_stride: int, z_stride: int) -> Callable[..., Any]:
    """As in ``device``."""
    n = elements(dtype)

    def rows_dot_f32(rows: int, z: int) -> tuple[Any, ...]:
        vectors = [np.array(view(z + b * z_stride, ctypes.c_float, n)[:], np.float32) for b in range(batch)]
        with np.errstate(all="ignore"):
            return tuple(
                _vector(rows + r * row_stride, dtype) @ vectors[b] for r in range(n_rows) for b in range(batch)
            )

    return rows_dot_f32


def make_rows_add(
    dtype: str, n_rows: int, batch: int, chunks: int, row_stride: int, chunk_stride: int
) -> Callable[..., Any]:
    """As in ``device``."""

    def rows_add(rows: int, v: tuple[Any, ...], y: tuple[Any, ...]) -> tuple[Any, ...]:
        total = np.array(y, np.float32).reshape(batch, chunks, -1)
        for r in range(n_rows):
            for c in range(chunks):
                row = _vector(rows + r * row_stride + c * chunk_stride, dtype)
                with np.errstate(all="ignore"):
                    total[:, c] += np.outer(v[r * batch : (r + 1) * batch], row)
        return tuple(total.ravel())

    return rows_add


def make_zeros(n: int) -> Callable[[], tuple[Any, ...]]:
    """As in ``device``."""
    return lambda: (np.float32(0.0),) * n


def make_store_columns(
    dtype: str, batch: int, chunks: int, token_stride: int, chunk_stride: int
) -> Callable[..., None]:
    """As in ``device``."""
    n = elements(dtype)

    def store_columns(address: int, y: tuple[Any, ...], limit: int) -> None:
        for c in range(min(limit, chunks)):
            for b in range(batch):
                at = (b * chunks + c) * n
                place = view(address + b * token_stride + c * chunk_stride, ctypes.c_float, n)
                place[:] = [float(a) for a in y[at : at + n]]

    return store_columns


def make_sum_strided(n: int, stride: int) -> Callable[..., tuple[Any, ...]]:
    """As in ``device``."""

    def sum_strided(address: int, count: int) -> tuple[Any, ...]:
        total = np.zeros(4, np.float32)
        for i in range(min(n, count)):
            total += np.array(view(address + i * stride, ctypes.c_float, 4)[:], np.float32)
        return tuple(total)

    return sum_strided


def make_load_narrow(dtype: str) -> Callable[[int], Any]:
    """As in ``device``."""
    if dtype == "float32":
        return load_f32
    return lambda address: widen(bytes(view(address, ctypes.c_uint16)), dtype)[0]


def narrow(value: Any, dtype: str) -> bytes:
    """An element rounded to nearest even, as it is stored."""
    if dtype == "float32":
        return np.float32(value).tobytes()
    if dtype == "float16":
        return np.float16(value).tobytes()
    word = int(np.float32(value).view(np.uint32))
    bits = 0x7FC0 if value != value else (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.uint16(bits).tobytes()


def make_store_narrow(dtype: str) -> Callable[[int, Any], None]:
    """As in ``device``."""
    if dtype == "float32":
        return store_f32

    def store(address: int, value: Any) -> None:
        view(address, ctypes.c_uint16)[0] = int(np.frombuffer(narrow(value, dtype), np.uint16)[0])

    return store
