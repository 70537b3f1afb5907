"""The machine behind the simulated twins: memory with its bounds, and the threads of a block.

Addresses are host addresses, checked against the buffers that ``allowed`` knows, so that a read or write out of bounds
is an IndexError instead of luck. Blocks run one after another.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# Threads that poll for one another hold the interpreter for 5 ms each otherwise: 7.8 s of processor time for a case of the
# predictor's kernel on five blocks, 2.7 s so.
sys.setswitchinterval(2e-4)

_buffers: list[tuple[int, int]] = []
_shared: list[int] = []
exchange: dict[int, Any] = {}


@contextmanager
def allowed(*arrays: np.ndarray, shared_bytes: int) -> Iterator[None]:
    """Buffers that kernels may touch while the context lasts, and the size of a block's shared memory."""
    shared = np.full(shared_bytes // 4 + 8, 0x7FC00001, np.uint32)  # NaN, and no hole: nothing may count on zeros
    low = -(-shared.ctypes.data // 16) * 16
    _shared[:] = [low]
    _buffers.append((low, low + shared_bytes))
    _buffers.extend((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays)
    try:
        yield
    finally:
        _buffers.clear()
        exchange.clear()


def view(address: int, kind: Any, n: int = 1) -> Any:
    """Array of ``n`` C values at an address of a known buffer."""
    size = ctypes.sizeof(kind) * n
    address = int(address)
    if address % min(size, 16):
        raise IndexError(f"address {address} is not aligned to {size} bytes")
    if not any(low <= address and address + size <= high for low, high in _buffers):
        raise IndexError(f"{size} bytes at {address}: outside every buffer of the launch")
    return (kind * n).from_address(address)


def shared_memory() -> int:
    """Address of the block's shared memory."""
    return _shared[0]


def thread() -> Any:
    """The simulator's thread object of the caller: it knows its indices and how to wait for its block."""
    return threading.current_thread()


def syncthreads() -> None:
    """Barrier of the block."""
    thread().syncthreads()
