"""Add to the hidden state and norm it in one launch, which lets the kernel behind it start to read its weights at once.

To bring the next weights into L2 meanwhile, and those of the next product while attention runs, by the multiprocessors that
have nothing to do, gained nothing: 161.2 us a dense layer without, 162.3 us with 12 and 8 MiB (Llama-3.1-8B, H100).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda, int64, void

from kernels_numba.gpu.ptx.dtypes import BYTES, elements

_MAX_THREADS = 1024
# Addresses of: the hidden state, what is added, the weight of the norm of what is added, the weight of the norm, the new
# hidden state, the normed one.
SIGNATURE = void(*[int64] * 6)


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
    """

    d_model: int
    dtype: str
    offset: float
    eps: float
    inner: bool

    @property
    def pieces(self) -> int:
        """16-byte pieces of a row."""
        return self.d_model * BYTES[self.dtype] // 16

    @property
    def threads(self) -> int:
        """Threads of a block: whole warps."""
        return 32 * math.ceil(self.pieces / 32)

    def check(self) -> NormPlan:
        """Raise ValueError for a shape that the kernel does not take."""
        if self.d_model % 8 or self.pieces > _MAX_THREADS:
            raise ValueError(
                f"d_model={self.d_model} in {self.dtype}: a multiple of 8, at most {_MAX_THREADS} times 16 bytes"
            )
        return self


def make_mean_square(plan: NormPlan, dev: Any) -> Any:
    """``mean_square(...)``: of the block's values, one piece a thread, in every thread."""
    warps, d_model, zero = plan.threads // 32, np.float32(plan.d_model), np.float32(0.0)
    square_sum = dev.make_square_sum(plan.dtype)

    @dev.device_function
    def mean_square(shared, values, tid):
        total = square_sum(values)
        bit = 1
        while bit < 32:
            total += dev.lane_xor(total, bit)
            bit *= 2
        dev.syncthreads()
        dev.shared_store_f32(shared + (tid >> 5) * 4, total)
        dev.syncthreads()
        total = zero
        for warp in range(warps):
            total += dev.shared_load_f32(shared + warp * 4)
        return total / d_model

    return mean_square


def make_kernel(plan: NormPlan, dev: Any) -> Callable[..., None]:
    """The undecorated kernel; ``dev`` is the module ``ptx.vectors`` or its twin."""
    plan.check()
    pieces, inner = plan.pieces, plan.inner
    widen, store = dev.make_piece_widen(plan.dtype), dev.make_piece_store(plan.dtype)
    added, rounded = dev.make_pieces_add(plan.dtype), dev.make_pieces_round(plan.dtype)
    scaled = dev.make_pieces_scale(plan.dtype, plan.offset)
    mean_square = make_mean_square(plan, dev)
    zeros, eps, one = dev.make_zeros(elements(plan.dtype)), np.float32(plan.eps), np.float32(1.0)

    def kernel(hidden, y, inner_weight, weight, new_hidden, normed):
        tid, shared = cuda.threadIdx.x, dev.shared_memory()
        dev.launch_dependents()
        at, mine = tid * 16, tid < pieces
        old, more, scale, more_scale = zeros(), zeros(), zeros(), zeros()
        if mine:
            old, more, scale = widen(dev.load16(hidden + at)), widen(dev.load16(y + at)), widen(dev.load16(weight + at))
            if inner:
                more_scale = widen(dev.load16(inner_weight + at))
        if inner:
            more = rounded(scaled(more, more_scale, one / math.sqrt(mean_square(shared, more, tid) + eps)))
        total = rounded(added(old, more))
        result = scaled(total, scale, one / math.sqrt(mean_square(shared, total, tid) + eps))
        if mine:
            store(new_hidden + at, total)
            store(normed + at, result)

    return kernel
