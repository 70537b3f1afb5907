"""Exactly k neurons a token: the selection of the ideal modes in one pass over the scores, one block a token.

``torch.topk`` sorts what need not be sorted, and finding ties takes ten more passes over memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda, int32

THREADS = 256  # one for each value of a digit


def make_key(n_digits: int) -> Any:
    """``key_of(bits)``: unsigned 32-bit integer in the order of the scores: -0 equals 0, every NaN is above infinity."""
    narrow = n_digits == 2

    def key_of(bits):
        word = (np.int64(bits) & 0xFFFF) << 16 if narrow else np.int64(bits) & 0xFFFFFFFF
        size = word & 0x7FFFFFFF
        if size > 0x7F800000:
            return np.int64(0xFFFFFFFF)
        if size == 0:
            return np.int64(0x80000000)
        return word | 0x80000000 if word == size else word ^ 0xFFFFFFFF

    return cuda.jit(device=True)(key_of)


def make_find(n_digits: int, key_of: Any) -> Any:
    """``find(...)``: leading bits of the kth score, and how many of those equal to it are kept."""

    def find(counts, chosen, scores, row, k, tid):
        prefix, room, d_ff = np.int64(0), np.int64(k), scores.shape[1]
        for digit in range(n_digits):
            shift = 24 - 8 * digit
            counts[tid] = 0
            cuda.syncthreads()
            for i in range(tid, d_ff, THREADS):
                key = key_of(scores[row, i])
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
            cuda.syncthreads()
            prefix = (prefix << 8) | chosen[0]
            room -= chosen[1]
        return prefix, room

    return cuda.jit(device=True)(find)


def make_kernel(n_digits: int) -> Any:
    """Undecorated kernel for scores of ``n_digits`` bytes, 2 (bf16) or 4 (fp32): radix selection, 8 bits a pass."""
    key_of, rest = make_key(n_digits), 32 - 8 * n_digits
    find = make_find(n_digits, key_of)

    def kernel(scores, keep, k):
        tid, row, d_ff = cuda.threadIdx.x, cuda.blockIdx.x, scores.shape[1]
        counts = cuda.shared.array(THREADS, int32)
        chosen = cuda.shared.array(2, int32)
        prefix, room = find(counts, chosen, scores, row, k, tid)
        # of those equal to the kth the lowest indices are kept: neighbouring neurons to one thread, then a prefix sum
        per_thread = (d_ff + THREADS - 1) // THREADS
        begin = tid * per_thread
        end = min(begin + per_thread, d_ff)
        equal = 0
        for i in range(begin, end):
            if key_of(scores[row, i]) >> rest == prefix:
                equal += 1
        counts[tid] = equal
        cuda.syncthreads()
        step = 1
        while step < THREADS:
            more = counts[tid - step] if tid >= step else 0
            cuda.syncthreads()
            counts[tid] += more
            cuda.syncthreads()
            step *= 2
        room -= counts[tid] - equal
        for i in range(begin, end):
            key = key_of(scores[row, i]) >> rest
            if key == prefix:
                keep[row, i] = 1 if room > 0 else 0
                room -= 1
            else:
                keep[row, i] = 1 if key > prefix else 0

    return kernel


@cache
def _compiled(n_digits: int) -> Any:
    return cuda.jit(make_kernel(n_digits))


def current_stream(tensor: Any) -> Any:
    """Torch's current stream of a tensor's device, as Numba takes it."""
    import torch

    handle = torch.cuda.current_stream(tensor.device).cuda_stream
    return cuda.external_stream(handle) if handle else 0


def keep_top_k(score: Any, k: int) -> Any:
    """Kept set of every token: all above the kth score, then those equal to it, lowest index first.

    Parameters
    ----------
    score : torch.Tensor on a CUDA device, shape (n_tokens, d_ff), bf16 or fp32
    k : int, 1 <= k <= d_ff

    Returns
    -------
    torch.Tensor, shape (n_tokens, d_ff), bool

    Raises
    ------
    ValueError
        Another dtype, or k outside its range.
    """
    import torch

    integers = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(score.dtype)
    n_tokens, d_ff = score.shape
    if integers is None or not 1 <= k <= d_ff:
        raise ValueError(f"scores of {score.dtype}, k={k}, d_ff={d_ff}: bf16 or fp32 and 1 <= k <= d_ff")
    keep = torch.empty(n_tokens, d_ff, dtype=torch.int8, device=score.device)
    if n_tokens:
        bits = cuda.as_cuda_array(score.contiguous().view(integers))
        _compiled(integers.itemsize)[n_tokens, THREADS, current_stream(score)](bits, cuda.as_cuda_array(keep), k)
    return keep.view(torch.bool)
