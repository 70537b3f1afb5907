"""Zeroes what a method drops, one warp a token, in one launch: the masked backend on a GPU.

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

_WARPS = 8  # tokens of a block
_DIGIT = 256  # values of 8 bits, of which a lane counts 8
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
    warps : int
        Tokens of a block.
    """

    score_bytes: int
    value_bytes: int
    not_finite: int = 0
    gathered: bool = False
    some: bool = False
    warps: int = _WARPS

    @property
    def signature(self) -> Any:
        """Scores, values, rows, flags; address of the three counts; first row, tokens, width, k, key of the threshold."""
        pointers = [_INTEGERS[self.score_bytes], _INTEGERS[self.value_bytes], types.int64, types.uint8]
        return types.void(*map(types.CPointer, pointers), *[types.int64] * 6)


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


def make_find(plan: MaskPlan, key_of: Any, dev: Any) -> Any:
    """``find(...)``: the key of the kth score of a warp's token, how many equal to it are kept, and how many there are."""
    score_bytes, lost = plan.score_bytes, 32 - 8 * plan.score_bytes  # bits of a key that are 0 in narrow scores
    ballot, match_any, lane_of, sync_warp = dev.ballot, dev.match_any, dev.lane_of, dev.sync_warp

    def find(counts, scores, start, width, k, lane, bins):
        prefix, room, equal = np.int64(0), np.int64(k), np.int64(0)
        for digit in range(score_bytes):
            shift = 24 - 8 * digit
            for value in range(lane, _DIGIT, 32):
                counts[bins + value] = 0
            sync_warp()
            for begin in range(0, width, 32):
                mine = np.int32(-1)
                if begin + lane < width:
                    key = key_of(scores[start + begin + lane])
                    if digit == 0 or key >> (shift + 8) == prefix:
                        mine = np.int32((key >> shift) & 255)
                peers = match_any(mine)  # scores share few leading digits: one addition for all lanes with the same
                if mine >= 0 and peers & ((1 << lane) - 1) == 0:
                    cuda.atomic.add(counts, bins + mine, cuda.popc(peers))
            sync_warp()
            own = np.int32(0)
            for value in range(8):
                own += counts[bins + 8 * lane + value]
            above, step = own, 1
            while step < 32:  # counts of this lane's values and all higher ones
                more = lane_of(above, lane + step)
                if lane + step < 32:
                    above += more
                step *= 2
            above -= own
            place, passed, there = np.int32(-1), np.int32(0), np.int32(0)
            for value in range(7, -1, -1):
                count = counts[bins + 8 * lane + value]
                if above < room and above + count >= room:
                    place, passed, there = np.int32(8 * lane + value), np.int32(above), np.int32(count)
                above += count
            finder = cuda.ffs(ballot(place >= 0)) - 1
            prefix = (prefix << 8) | lane_of(place, finder)
            room -= lane_of(passed, finder)
            equal = np.int64(lane_of(there, finder))
            sync_warp()
        return prefix << lost, room, equal

    return dev.device_function(find)


def make_kernel(plan: MaskPlan, dev: Any) -> Any:
    """Undecorated kernel: radix selection, 8 bits a pass, then zeros; ``dev`` as for all kernels (README.md)."""
    key_of = make_key(plan.score_bytes, dev)
    find = make_find(plan, key_of, dev)
    not_finite, gathered, some, warps = plan.not_finite, plan.gathered, plan.some, plan.warps
    significant = np.int64(0xFFFFFFFF << (32 - 8 * plan.score_bytes))
    add_i64, ballot, n_counts = dev.add_i64, dev.ballot, plan.warps * _DIGIT

    def kernel(scores, values, rows, flags, counters, first, n_tokens, width, k, limit):
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        counts = cuda.shared.array(n_counts, int32)
        token = np.int64(cuda.blockIdx.x) * warps + warp
        if token >= n_tokens:
            return
        if some and flags[token] == 0:
            return
        start = token * width
        to = (rows[token] if gathered else first + token) * width
        room, equal = np.int64(0), np.int64(0)
        if k > 0:
            limit, room, equal = find(counts, scores, start, width, k, lane, warp * _DIGIT)
        n_kept, n_equal, nan, infinite = 0, 0, False, False
        for begin in range(0, width, 32):
            i = begin + lane
            inside = i < width
            key = np.int64(0)
            if inside:
                key = key_of(scores[start + i])
                if not_finite != 0:
                    nan = nan or key == _NAN
                    infinite = infinite or values[to + i] & not_finite == not_finite
                if k > 0:
                    key &= significant
            keep = inside and key >= limit
            if equal > room:  # of those equal to the kth the lowest indices are kept
                votes = ballot(inside and key == limit)
                if key == limit:
                    keep = keep and n_equal + cuda.popc(votes & ((1 << lane) - 1)) < room
                n_equal += cuda.popc(votes)
            if inside and not keep:
                values[to + i] = 0
            if k == 0:
                n_kept += cuda.popc(ballot(keep))
        fault = False
        if not_finite != 0:
            fault = ballot(nan) != 0 and ballot(infinite) == 0
        if lane == 0:
            add_i64(counters, k if k > 0 else n_kept)
            if fault:
                add_i64(counters + 8, 1)
            add_i64(counters + 16, 1)

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
        launch = _compiled(plan)[-(-len(score) // plan.warps), 32 * plan.warps, current_stream(score)]
        launch(score.data_ptr(), values.data_ptr(), rows, flags, counters, numbers[0], *score.shape, *numbers[1:])


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
    counters : Tensor, shape (3,), int64
        To the first what was kept is added; to the second the tokens with a NaN score whose values are all finite; to the third the
        tokens.
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
    counters = torch.empty(3, dtype=torch.int64, device=score.device)  # nobody reads them
    _launch(score, keep, MaskPlan(score.element_size(), 1), 0, 0, counters.data_ptr(), 0, max(1, k), 0)
    return keep
