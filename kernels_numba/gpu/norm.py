"""Add to the hidden state and norm it in one launch, while the other multiprocessors bring the next weights into L2.

One block has the work of one row; the memory would stand still meanwhile (3 us twice a layer on an H100).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda, int64, void

from kernels_numba.gpu.plan import BYTES

_MAX_THREADS = 1024
# Addresses of: the hidden state, what is added, the weight of the norm of what is added, the weight of the norm, the new
# hidden state, the normed one, what to prefetch. Then its bytes.
SIGNATURE = void(*[int64] * 8)


@dataclass(frozen=True)
class NormPlan:
    """What an add-and-norm kernel is compiled for.

    Parameters
    ----------
    d_model : int
        A multiple of 8.
    dtype : str
    offset : float
        Norms scale by ``weight + offset``.
    eps : float
    inner : bool
        Norm what is added, too, before it is added (Gemma).
    n_blocks : int
        All but the first prefetch.
    """

    d_model: int
    dtype: str
    offset: float
    eps: float
    inner: bool
    n_blocks: int = 1

    @property
    def pieces(self) -> int:
        """16-byte pieces of a row."""
        return self.d_model * BYTES[self.dtype] // 16

    @property
    def chunks(self) -> int:
        """Pieces of a thread."""
        return math.ceil(self.pieces / _MAX_THREADS)

    @property
    def threads(self) -> int:
        """Threads of a block: whole warps."""
        return 32 * math.ceil(self.pieces / self.chunks / 32)

    def check(self) -> NormPlan:
        """Raise ValueError for a shape that the kernel does not take."""
        if self.d_model % 8 or self.chunks > 1:
            raise ValueError(
                f"d_model={self.d_model} in {self.dtype}: a multiple of 8, at most {_MAX_THREADS} times 16 bytes"
            )
        return self


def make_prefetch(dev: Any, threads: int) -> Any:
    """``fetch(...)``: ask for every line of a block's share of some bytes of global memory; nothing waits for them."""
    line, prefetch = 128, dev.prefetch

    @dev.device_function
    def fetch(address, n_bytes, number, n_blocks, tid):
        for at in range((number * threads + tid) * line, n_bytes, n_blocks * threads * line):
            prefetch(address + at)

    return fetch


def make_mean_square(plan: NormPlan, dev: Any) -> Any:
    """``mean_square(...)``: of the block's values, one piece a thread, in every thread."""
    warps, d_model, zero = plan.threads // 32, np.float32(plan.d_model), np.float32(0.0)
    square_sum = dev.make_square_sum(plan.dtype)
    load, store, sync, lane_xor = dev.shared_load_f32, dev.shared_store_f32, dev.syncthreads, dev.lane_xor

    @dev.device_function
    def mean_square(shared, values, tid):
        total = square_sum(values)
        bit = 1
        while bit < 32:
            total += lane_xor(total, bit)
            bit *= 2
        sync()
        store(shared + (tid >> 5) * 4, total)
        sync()
        total = zero
        for warp in range(warps):
            total += load(shared + warp * 4)
        return total / d_model

    return mean_square


def make_kernel(plan: NormPlan, dev: Any) -> Callable[..., None]:
    """The undecorated kernel; ``dev`` is the module ``pieces`` or its twin."""
    plan.check()
    pieces, inner, n_blocks = plan.pieces, plan.inner, plan.n_blocks
    widen, store, load16 = dev.make_piece_widen(plan.dtype), dev.make_piece_store(plan.dtype), dev.load16
    added, rounded = dev.make_pieces_add(plan.dtype), dev.make_pieces_round(plan.dtype)
    scaled = dev.make_pieces_scale(plan.dtype, plan.offset)
    mean_square, fetch = make_mean_square(plan, dev), make_prefetch(dev, plan.threads)
    zeros, eps, one = dev.make_zeros(dev.elements(plan.dtype)), np.float32(plan.eps), np.float32(1.0)
    shared_memory, launch_dependents = dev.shared_memory, dev.launch_dependents

    def kernel(hidden, y, inner_weight, weight, new_hidden, normed, ahead, n_bytes):
        tid, block, shared = cuda.threadIdx.x, cuda.blockIdx.x, shared_memory()
        launch_dependents()
        if block > 0:
            fetch(ahead, n_bytes, block - 1, n_blocks - 1, tid)
            return
        at, mine = tid * 16, tid < pieces
        old, more, scale, more_scale = zeros(), zeros(), zeros(), zeros()
        if mine:
            old, more, scale = widen(load16(hidden + at)), widen(load16(y + at)), widen(load16(weight + at))
            if inner:
                more_scale = widen(load16(inner_weight + at))
        if inner:
            more = rounded(scaled(more, more_scale, one / math.sqrt(mean_square(shared, more, tid) + eps)))
        total = rounded(added(old, more))
        result = scaled(total, scale, one / math.sqrt(mean_square(shared, total, tid) + eps))
        if mine:
            store(new_hidden + at, total)
            store(normed + at, result)

    return kernel
