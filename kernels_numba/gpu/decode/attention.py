"""Attention of one decode step in one launch: rotary embedding, cache write, scores, softmax, mix of the values.

torch takes eight launches for it (23 us a layer of the Llama-3.1-8B shape at 128 tokens of context on an H100), none of
them long enough to hide the next one's launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int64, void

from kernels_numba.gpu.ptx.dtypes import BYTES

THREADS = 512
_WARPS, _AT_ONCE = THREADS // 32, 4  # warps; keys that a lane has in flight
_LOG2_E = math.log2(math.e)
_SHARED = 48 << 10


class Shared(NamedTuple):
    """Areas of a block's shared memory, byte offsets, and their total."""

    query: int  # turned and scaled queries, fp32
    largest: int  # largest score of each query
    sum: int  # sum of the powers below it
    last: int  # whether this block is the last of its queries'
    score: int  # scores, then their powers
    mix: int  # replaces the scores: every warp's mix of the values
    total: int


@dataclass(frozen=True)
class AttentionPlan:
    """What an attention kernel is compiled for.

    Parameters
    ----------
    n_kv, group, head_dim : int
        Heads of keys and values, queries that share one, elements of a head.
    rotary_dim : int
        Entries of a head that turn; the rest pass.
    length : int
        Tokens that the cache holds, a multiple of 256.
    dtype : str
    scale : float
        Of the scores.
    cap : float, optional
        Scores go through ``cap * tanh(score / cap)``.
    window : int, optional
        Tokens that are looked back at.
    queries : int
        Queries of a block, a divisor of ``group``: few for short caches, where a block's own work is what takes time.
    split : int
        Keys of a block; with more than one block for its queries the last to end adds them up.
    """

    n_kv: int
    group: int
    head_dim: int
    rotary_dim: int
    length: int
    dtype: str
    scale: float
    cap: float | None = None
    window: int | None = None
    queries: int = 1
    split: int = 512

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return BYTES[self.dtype]

    @property
    def lanes(self) -> int:
        """Lanes that share a key, 16 bytes each."""
        return self.head_dim * self.element // 16

    @property
    def keys(self) -> int:
        """Keys that the block reads at once."""
        return _WARPS * 32 // self.lanes

    @property
    def n_splits(self) -> int:
        """Blocks that share the keys of a head."""
        return math.ceil(self.length / self.split)

    @property
    def n_heads(self) -> int:
        """Groups of queries that blocks work on."""
        return self.n_kv * self.group // self.queries

    @property
    def row(self) -> int:
        """Floats of a query's scores in shared memory, the keys read past the last one included."""
        return self.split + _AT_ONCE * self.keys

    @property
    def shared(self) -> Shared:
        """Areas of a block's shared memory."""
        width = self.queries * self.head_dim
        query, reserved, score = 4 * width, 4 * 8, 4 * max(self.queries * self.row, _WARPS * width)
        at = query + 3 * reserved
        return Shared(0, query, query + reserved, query + 2 * reserved, at, at, at + score)

    @property
    def partial_floats(self) -> int:
        """Floats in which the blocks of all heads leave their shares: mix, largest score, sum."""
        return self.n_heads * self.n_splits * self.queries * (self.head_dim + 2)

    def check(self) -> AttentionPlan:
        """Raise ValueError for a shape that the kernel does not take."""
        pieces = self.head_dim * self.element / 16
        if pieces not in (4, 8, 16, 32) or self.group % self.queries or self.shared.total > _SHARED:
            raise ValueError(
                f"head_dim={self.head_dim} in {self.dtype} with {self.queries} of {self.group} queries a block: the kernel "
                f"takes heads of 64, 128, 256 or 512 bytes and what fits {_SHARED >> 10} KiB; use the torch functions"
            )
        return self


def make_query(plan: AttentionPlan, dev: Any) -> Any:
    """``query(...)``: turned and scaled queries into shared memory, new key and value into the cache.

    Every block that looks at the new key writes it: all write the same bits, and none waits for another.
    """
    head, half, n_kv, queries = plan.head_dim, plan.rotary_dim // 2, plan.n_kv, plan.queries
    n_queries = plan.n_kv * plan.group
    rotary, size, at = plan.rotary_dim, plan.element, plan.shared
    load, store, scale = dev.make_load_narrow(plan.dtype), dev.make_store_narrow(plan.dtype), np.float32(plan.scale)
    cache_half = plan.n_kv * plan.length * plan.head_dim * plan.element

    @dev.device_function
    def turned(row, d, cos, sin):
        value = load(row + d * size)
        if d >= rotary:
            return value
        if d < half:
            other = -load(row + (d + half) * size)
        else:
            other = load(row + (d - half) * size)
        return value * load(cos + d * size) + other * load(sin + d * size)

    @dev.device_function
    def query(shared, qkv, cos, sin, number, kv_head, mine, cache_row, tid):
        for i in range(tid, queries * head, THREADS):
            row = qkv + (number * queries + i // head) * head * size
            dev.shared_store_f32(shared + at.query + i * 4, turned(row, i % head, cos, sin) * scale)
        if mine:
            keys = qkv + (n_queries + kv_head) * head * size
            for d in range(tid, head, THREADS):
                store(cache_row + d * size, turned(keys, d, cos, sin))
                store(cache_row + cache_half + d * size, load(keys + (n_kv * head + d) * size))

    return query


def make_scores(plan: AttentionPlan, dev: Any) -> Any:
    """``scores(...)``: products of the queries with keys ``begin`` up to ``end`` into shared memory."""
    lanes, keys, queries, head_bytes = plan.lanes, plan.keys, plan.queries, plan.head_dim * plan.element
    vector, at = 16 // plan.element, plan.shared
    load_query, _ = dev.make_shared_floats(queries, vector, plan.head_dim * 4)
    _, store_scores = dev.make_shared_floats(queries, 1, plan.row * 4)
    dot, total = dev.make_piece_dot(plan.dtype, queries), dev.make_lanes_total(queries, 1, lanes)

    @dev.device_function
    def scores(shared, cache_head, first, begin, end, tid):
        piece, own = tid % lanes, tid // lanes
        q = load_query(shared + at.query + piece * vector * 4)
        mine = cache_head + piece * 16
        for start in range(begin, end, keys * 4):
            k0, k1, k2, k3 = start + own, start + own + keys, start + own + 2 * keys, start + own + 3 * keys
            w0 = dev.load16(mine + min(k0, end - 1) * head_bytes)
            w1 = dev.load16(mine + min(k1, end - 1) * head_bytes)
            w2 = dev.load16(mine + min(k2, end - 1) * head_bytes)
            w3 = dev.load16(mine + min(k3, end - 1) * head_bytes)
            s0, s1, s2, s3 = total(dot(w0, q)), total(dot(w1, q)), total(dot(w2, q)), total(dot(w3, q))
            if piece == 0:
                place = shared + at.score
                store_scores(place + (k0 - first) * 4, s0)
                store_scores(place + (k1 - first) * 4, s1)
                store_scores(place + (k2 - first) * 4, s2)
                store_scores(place + (k3 - first) * 4, s3)

    return scores


def make_softmax(plan: AttentionPlan, dev: Any) -> Any:
    """``softmax(...)``: scores to powers below their largest, zeros outside ``begin`` to ``end``; a warp a query."""
    queries, row, capped = plan.queries, plan.row, plan.cap is not None
    cap = np.float32(plan.cap or 1.0)
    at = plan.shared
    log2_e, lowest, zero, one, two = (np.float32(v) for v in (_LOG2_E, -3.0e38, 0.0, 1.0, 2.0))
    twice, past = np.float32(2 * _LOG2_E), _AT_ONCE * plan.keys

    @dev.device_function
    def softmax(shared, begin, end, tid):
        """``begin`` and ``end`` counted from the block's first key; no key at all gives a sum of 0."""
        lane, warp = tid & 31, tid >> 5
        place, mine = shared + at.score + warp * row * 4, warp < queries
        largest = lowest
        for i in range(lane, end, 32):
            if mine and begin <= i:
                score = dev.shared_load_f32(place + i * 4)
                if capped:
                    score = cap * (one - dev.divide(two, dev.exp2(score / cap * twice) + one))
                score *= log2_e
                dev.shared_store_f32(place + i * 4, score)
                if not score <= largest:  # NaN comes through
                    largest = score
        bit = 1
        while bit < 32:
            other = dev.lane_xor(largest, bit)
            if not other <= largest:
                largest = other
            bit *= 2
        total = zero
        for i in range(lane, min(end + past, row), 32):  # those read past the last one count nothing
            if mine:
                power = zero
                if begin <= i and i < end:
                    power = dev.exp2(dev.shared_load_f32(place + i * 4) - largest)
                dev.shared_store_f32(place + i * 4, power)
                total += power
        bit = 1
        while bit < 32:
            total += dev.lane_xor(total, bit)
            bit *= 2
        if mine and lane == 0:
            dev.shared_store_f32(shared + at.largest + warp * 4, largest)
            dev.shared_store_f32(shared + at.sum + warp * 4, total)

    return softmax


def make_mix(plan: AttentionPlan, dev: Any) -> Any:
    """``mix(...)``: every warp's sum of powers times values, (warps, queries, head_dim) in shared memory."""
    lanes, keys, queries, head_bytes = plan.lanes, plan.keys, plan.queries, plan.head_dim * plan.element
    vector, width = 16 // plan.element, plan.queries * plan.head_dim * 4
    at = plan.shared
    load_powers, _ = dev.make_shared_floats(queries, 1, plan.row * 4)
    _, store_mix = dev.make_shared_floats(queries, vector, plan.head_dim * 4)
    add, zeros = dev.make_piece_add(plan.dtype, queries), dev.make_zeros(queries * vector)
    total = dev.make_lanes_total(queries * vector, lanes, 32)

    @dev.device_function
    def mix(shared, values_head, first, begin, end, tid):
        piece, own = tid % lanes, tid // lanes
        mine, powers, sums = values_head + piece * 16, shared + at.score, zeros()
        for start in range(begin, end, keys * 4):
            k0, k1, k2, k3 = start + own, start + own + keys, start + own + 2 * keys, start + own + 3 * keys
            w0 = dev.load16(mine + min(k0, end - 1) * head_bytes)
            w1 = dev.load16(mine + min(k1, end - 1) * head_bytes)
            w2 = dev.load16(mine + min(k2, end - 1) * head_bytes)
            w3 = dev.load16(mine + min(k3, end - 1) * head_bytes)
            sums = add(w0, load_powers(powers + (k0 - first) * 4), sums)
            sums = add(w1, load_powers(powers + (k1 - first) * 4), sums)
            sums = add(w2, load_powers(powers + (k2 - first) * 4), sums)
            sums = add(w3, load_powers(powers + (k3 - first) * 4), sums)
        sums = total(sums)
        dev.syncthreads()
        if (tid & 31) < lanes:
            store_mix(shared + at.mix + (tid >> 5) * width + piece * vector * 4, sums)

    return mix


def make_combined(plan: AttentionPlan, dev: Any) -> Any:
    """``combined(parts, i)``: entry ``i`` of the mixes that all blocks left, each scaled to the largest score of all."""
    width, queries, head, n_splits = plan.queries * plan.head_dim, plan.queries, plan.head_dim, plan.n_splits
    block_bytes, zero = (width + 2 * queries) * 4, np.float32(0.0)

    @dev.device_function
    def combined(parts, i):
        q = i // head
        largest = dev.load_f32(parts + (width + q) * 4)
        for s in range(1, n_splits):
            other = dev.load_f32(parts + s * block_bytes + (width + q) * 4)
            if not other <= largest:
                largest = other
        total, below = zero, zero
        for s in range(n_splits):
            part = parts + s * block_bytes
            share = dev.load_f32(part + (width + queries + q) * 4)
            if share != zero:
                weight = dev.exp2(dev.load_f32(part + (width + q) * 4) - largest)
                total += weight * dev.load_f32(part + i * 4)
                below += weight * share
        return dev.divide(total, below)

    return combined


def make_output(plan: AttentionPlan, dev: Any) -> Any:
    """``output(...)``: the block's mix over its sum, or with several blocks for its queries the last one's total of all."""
    queries, head, n_splits, size, at = plan.queries, plan.head_dim, plan.n_splits, plan.element, plan.shared
    width, block_bytes = queries * head, (queries * head + 2 * queries) * 4
    store, zero, combined = dev.make_store_narrow(plan.dtype), np.float32(0.0), make_combined(plan, dev)

    @dev.device_function
    def block_mix(shared, i):
        total = zero
        for warp in range(_WARPS):
            total += dev.shared_load_f32(shared + at.mix + (warp * width + i) * 4)
        return total

    @dev.device_function
    def output(shared, partial, counter, out, number, split, tid):
        place = out + number * width * size
        if n_splits == 1:
            for i in range(tid, width, THREADS):
                store(
                    place + i * size,
                    dev.divide(block_mix(shared, i), dev.shared_load_f32(shared + at.sum + i // head * 4)),
                )
            return
        parts = partial + number * n_splits * block_bytes
        mine = parts + split * block_bytes
        for i in range(tid, width, THREADS):
            dev.store_f32(mine + i * 4, block_mix(shared, i))
        if tid < queries:
            dev.store_f32(mine + (width + tid) * 4, dev.shared_load_f32(shared + at.largest + tid * 4))
            dev.store_f32(mine + (width + queries + tid) * 4, dev.shared_load_f32(shared + at.sum + tid * 4))
        dev.syncthreads()
        if tid == 0:  # never cleared: every launch adds n_splits
            dev.shared_store_i32(shared + at.last, dev.atomic_add_acq_rel(counter + number * 4, 1) % n_splits)
        dev.syncthreads()
        if dev.shared_load_i32(shared + at.last) == n_splits - 1:
            for i in range(tid, width, THREADS):
                store(place + i * size, combined(parts, i))

    return output


# Addresses of: queries, keys and values of the token; its position; cosines and sines of every position; the cache
# (2, n_kv, length, head_dim); the blocks' shares; a count for every group of queries; the output.
SIGNATURE = void(*[int64] * 8)


def make_kernel(plan: AttentionPlan, dev: Any) -> Callable[..., None]:
    """The undecorated kernel; ``dev`` is the module ``ptx.vectors`` or its twin."""
    plan.check()
    query, scores, softmax = (make(plan, dev) for make in (make_query, make_scores, make_softmax))
    mix, output = make_mix(plan, dev), make_output(plan, dev)
    n_splits, split_keys = plan.n_splits, plan.split
    sharers, line = plan.group // plan.queries, 128
    window, table_bytes = plan.window or 0, plan.rotary_dim * plan.element
    head_bytes, half_bytes = plan.head_dim * plan.element, plan.n_kv * plan.length * plan.head_dim * plan.element
    row_bytes = plan.length * head_bytes

    def kernel(qkv, position_at, cos, sin, kv_cache, partial, counter, out):
        tid, block, shared = cuda.threadIdx.x, cuda.blockIdx.x, dev.shared_memory()
        number, split = block // n_splits, block % n_splits
        kv_head = number // sharers
        position, first = dev.load_i32(position_at), split * split_keys
        begin, end = first, min(first + split_keys, position + 1)
        if window > 0:
            begin = max(begin, position - window + 1)
        at = kv_cache + kv_head * row_bytes
        for place in range(begin * head_bytes + tid * line, end * head_bytes, THREADS * line):
            dev.prefetch(at + place)  # while the queries turn
            dev.prefetch(at + half_bytes + place)
        mine = position >= first and position < first + split_keys
        query(
            shared, qkv, cos + position * table_bytes, sin + position * table_bytes, number, kv_head, mine,
            at + position * head_bytes, tid,
        )  # fmt: skip
        dev.syncthreads()
        scores(shared, at, first, begin, end, tid)
        dev.syncthreads()
        softmax(shared, begin - first, end - first, tid)
        dev.syncthreads()
        mix(shared, at + half_bytes, first, begin, end, tid)
        dev.syncthreads()
        output(shared, partial, counter, out, number, split, tid)

    return kernel
