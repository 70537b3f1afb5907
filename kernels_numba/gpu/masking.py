"""Zeroes what a method drops, one block a token, in one launch: the masked backend on a GPU.

Exactly k entries a token stay, or all that are not below a threshold. ``torch.topk`` sorts what need not be sorted, finding ties
takes ten more passes over memory, and a mask, its sums and the product with it ten more launches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda, int32, types

if TYPE_CHECKING:
    from torch import Tensor

THREADS = 256  # one for each value of a digit
_NAN = 0xFFFFFFFF  # key of a score that is NaN
_INTEGERS = {1: types.int8, 2: types.int16, 4: types.int32}


@dataclass(frozen=True)
class MaskPlan:
    """What a kernel is compiled for.

    Parameters
    ----------
    score_bytes : int
        2 for bf16, 4 for fp32.
    value_bytes : int
        Bytes of an entry that is set to zero: 1, 2 or 4.
    not_finite : int
        Bits of an entry that are all set if and only if it is not finite; 0: never look.
    gathered : bool
        Tokens lie at rows that are given; else one after another.
    some : bool
        A flag a token says whether it takes part.
    """

    score_bytes: int
    value_bytes: int
    not_finite: int = 0
    gathered: bool = False
    some: bool = False

    @property
    def signature(self) -> Any:
        """Scores, values, rows, flags; address of the two counts; first row, width, k, key of the threshold."""
        pointers = [_INTEGERS[self.score_bytes], _INTEGERS[self.value_bytes], types.int64, types.uint8]
        return types.void(*map(types.CPointer, pointers), *[types.int64] * 5)


def make_key(score_bytes: int, dev: Any) -> Any:
    """``key_of(bits)``: unsigned 32-bit integer in the order of the scores: -0 equals 0, every NaN is above infinity."""
    narrow = score_bytes == 2

    def key_of(bits):
        word = (np.int64(bits) & 0xFFFF) << 16 if narrow else np.int64(bits) & 0xFFFFFFFF
        size = word & 0x7FFFFFFF
        if size > 0x7F800000:
            return np.int64(_NAN)
        if size == 0:
            return np.int64(0x80000000)
        return word | 0x80000000 if word == size else word ^ 0xFFFFFFFF

    return dev.device_function(key_of)


def make_find(score_bytes: int, key_of: Any, dev: Any) -> Any:
    """``find(...)``: the key of the kth score of a row, how many equal to it are kept, and how many there are."""
    lost = 32 - 8 * score_bytes  # bits of a key that are 0 in narrow scores

    def find(counts, chosen, scores, start, width, k, tid):
        prefix, room, equal = np.int64(0), np.int64(k), np.int64(0)
        for digit in range(score_bytes):
            shift = 24 - 8 * digit
            counts[tid] = 0
            cuda.syncthreads()
            for i in range(tid, width, THREADS):
                key = key_of(scores[start + i])
                if digit == 0 or key >> (shift + 8) == prefix:
                    cuda.atomic.add(counts, (key >> shift) & 255, 1)
            cuda.syncthreads()
            mine = counts[tid]
            step = 1
            while step < THREADS:  # counts of this digit value and all above it
                more = counts[tid + step] if tid + step < THREADS else 0
                cuda.syncthreads()
                counts[tid] += more
                cuda.syncthreads()
                step *= 2
            if counts[tid] >= room and counts[tid] - mine < room:
                chosen[0] = tid
                chosen[1] = counts[tid] - mine
                chosen[2] = mine
            cuda.syncthreads()
            prefix = (prefix << 8) | chosen[0]
            room -= chosen[1]
            equal = np.int64(chosen[2])
        return prefix << lost, room, equal

    return dev.device_function(find)


def make_kernel(plan: MaskPlan, dev: Any) -> Any:
    """Undecorated kernel: radix selection, 8 bits a pass, then zeros; ``dev`` as for all kernels (`gpu.README`)."""
    key_of = make_key(plan.score_bytes, dev)
    find = make_find(plan.score_bytes, key_of, dev)
    not_finite, gathered, some = plan.not_finite, plan.gathered, plan.some
    keep_low = np.int64(0xFFFFFFFF << (32 - 8 * plan.score_bytes))
    add_i64 = dev.add_i64

    def kernel(scores, values, rows, flags, counters, first, width, k, limit):
        tid, token = cuda.threadIdx.x, np.int64(cuda.blockIdx.x)
        counts = cuda.shared.array(THREADS, int32)
        chosen = cuda.shared.array(3, int32)
        if some and flags[token] == 0:
            return
        start = token * width
        row = rows[token] if gathered else first + token
        to = row * width
        room, equal = np.int64(0), np.int64(0)
        if k > 0:
            limit, room, equal = find(counts, chosen, scores, start, width, k, tid)
        n_kept, n_nan, n_bad = 0, 0, 0
        for i in range(tid, width, THREADS):
            key = key_of(scores[start + i]) & keep_low if k > 0 else key_of(scores[start + i])
            if not_finite != 0:
                if key >= (_NAN & keep_low):
                    n_nan = 1
                if values[to + i] & not_finite == not_finite:
                    n_bad = 1
            if key < limit:
                values[to + i] = 0
            else:
                n_kept += 1
        if (
            equal > room
        ):  # of those equal to the kth the lowest indices are kept: neighbours to one thread, then a prefix sum
            per_thread = (width + THREADS - 1) // THREADS
            begin = tid * per_thread
            end = min(begin + per_thread, width)
            mine = 0
            for i in range(begin, end):
                if key_of(scores[start + i]) & keep_low == limit:
                    mine += 1
            cuda.syncthreads()
            counts[tid] = mine
            cuda.syncthreads()
            step = 1
            while step < THREADS:
                more = counts[tid - step] if tid >= step else 0
                cuda.syncthreads()
                counts[tid] += more
                cuda.syncthreads()
                step *= 2
            room -= counts[tid] - mine
            for i in range(begin, end):
                if key_of(scores[start + i]) & keep_low == limit:
                    if room <= 0:
                        values[to + i] = 0
                    room -= 1
        if not_finite != 0:
            bad_score = cuda.syncthreads_or(n_nan)
            bad_value = cuda.syncthreads_or(n_bad)
            if tid == 0 and bad_score != 0 and bad_value == 0:
                add_i64(counters + 8, 1)
        total = np.int64(k)
        if k == 0:  # one addition to global memory a token, not one a thread
            if tid == 0:
                chosen[0] = 0
            cuda.syncthreads()
            cuda.atomic.add(chosen, 0, n_kept)
            cuda.syncthreads()
            total = np.int64(chosen[0])
        if tid == 0:
            add_i64(counters, total)

    return kernel


@cache
def _compiled(plan: MaskPlan) -> Any:
    from kernels_numba.gpu.ptx import vectors

    return cuda.jit(plan.signature)(make_kernel(plan, vectors))


def current_stream(tensor: Any) -> Any:
    """Torch's current stream of a tensor's device, as Numba takes it."""
    import torch

    handle = torch.cuda.current_stream(tensor.device).cuda_stream
    return cuda.external_stream(handle) if handle else 0


def threshold_key(threshold: float) -> int:
    """Key of a threshold, as `make_key` makes that of a score; of NaN 0, below which nothing is."""
    if math.isnan(threshold):
        return 0
    with np.errstate(over="ignore"):
        word = int(np.float32(threshold).view(np.uint32))
    size = word & 0x7FFFFFFF
    if size == 0:
        return 0x80000000
    return word | 0x80000000 if word == size else word ^ 0xFFFFFFFF


def _launch(score: Tensor, values: Tensor, plan: MaskPlan, rows: int, flags: int, counters: int, *numbers: int) -> None:
    if len(score):
        launch = _compiled(plan)[len(score), THREADS, current_stream(score)]
        launch(score.data_ptr(), values.data_ptr(), rows, flags, counters, numbers[0], score.shape[1], *numbers[1:])


def _checked(score: Tensor, k: int) -> Tensor:
    """Scores as the kernels take them: contiguous, bf16 or fp32."""
    import torch

    if (
        score.ndim != 2
        or score.dtype not in (torch.bfloat16, torch.float16, torch.float32)
        or not 0 <= k <= score.shape[1]
    ):
        raise ValueError(
            f"scores of {score.dtype}, shape {tuple(score.shape)}, k={k}: (n_tokens, width), at most fp32, 0 <= k <= width"
        )
    return (score if score.dtype == torch.bfloat16 else score.float()).contiguous()


def drop(
    score: Tensor,
    values: Tensor,
    counters: Tensor,
    *,
    k: int = 0,
    threshold: float = -math.inf,
    first: int = 0,
    rows: Tensor | None = None,
    alive: Tensor | None = None,
) -> None:
    """Set to zero, in place, what of every token is not among its k largest scores or, with k = 0, is below a threshold.

    Of equal scores the lowest indices are kept, NaN is above everything: as `suite.methods.base` defines it.

    Parameters
    ----------
    score : Tensor on a CUDA device, shape (n_tokens, width), bf16, fp16 or fp32
        Compared in fp32.
    values : Tensor, shape (n_rows, width), contiguous, bf16, fp16 or fp32
    counters : Tensor, shape (2,), int64
        To the first what was kept is added; to the second the tokens with a NaN score whose values are all finite.
    first : int
        Row of ``values`` of the first token; the others follow it.
    rows : Tensor, shape (n_tokens,), int64, optional
        Row of every token, instead.
    alive : Tensor, shape (n_tokens,), bool, optional
        Tokens that take part; the others are left as they are, and are not counted.

    Raises
    ------
    ValueError
        Another dtype, shape or layout, or k outside its range.
    """
    import torch

    bits = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}.get(values.dtype)
    if bits is None or values.ndim != 2 or values.shape[1] != score.shape[-1] or not values.is_contiguous():
        raise ValueError(
            f"values of {values.dtype}, shape {tuple(values.shape)}: (n_rows, width), contiguous, at most fp32, for scores of "
            f"shape {tuple(score.shape)}"
        )
    score = _checked(score, k)
    plan = MaskPlan(score.element_size(), values.element_size(), bits, rows is not None, alive is not None)
    addresses = [0 if part is None else part.data_ptr() for part in (rows, alive)]
    _launch(score, values, plan, *addresses, counters.data_ptr(), first, k, threshold_key(threshold))


def keep_top_k(score: Tensor, k: int) -> Tensor:
    """Kept set of every token: all above the kth score, then those equal to it, lowest index first.

    Parameters
    ----------
    score : Tensor on a CUDA device, shape (n_tokens, width), bf16, fp16 or fp32
    k : int, 1 <= k <= width

    Returns
    -------
    Tensor, shape (n_tokens, width), bool

    Raises
    ------
    ValueError
        Another dtype, or k outside its range.
    """
    import torch

    score = _checked(score, k)
    keep = torch.ones(score.shape, dtype=torch.bool, device=score.device)
    counters = torch.empty(2, dtype=torch.int64, device=score.device)  # nobody reads them
    _launch(score, keep, MaskPlan(score.element_size(), 1), 0, 0, counters.data_ptr(), 0, max(1, k), 0)
    return keep
