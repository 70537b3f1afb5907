"""The ring: the stream of weight rows through shared memory, the same for all phases of all kernels.

Each thread copies its own 16 bytes of every row into its own place of a ring of ``depth`` packets and reads them back
itself, so arriving data needs no barrier; ``depth`` packets are in flight whatever the phase.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.work_list import NEURON


def make_copy_row(plan: Plan, dev: Any) -> Any:
    """``copy_row(...)``: the thread's pieces of a row into its places of a slot; zeros if the row is not ``wanted``."""
    chunks, threads, pieces = plan.chunks, plan.threads, plan.pieces
    whole = chunks * threads == pieces
    copy = dev.make_copy(plan.hint)

    @dev.device_function
    def copy_row(place, row, tid, wanted):
        for c in range(chunks):
            piece = tid + c * threads
            size = 16 if wanted and (whole or piece < pieces) else 0
            copy(place + piece * 16, row + piece * size, size)  # size 0: an address that exists

    return copy_row


def make_ring(plan: Plan, dev: Any) -> SimpleNamespace:
    """Device functions that fill the ring's packets: ``copy_rows``, ``copy_neuron``."""
    slot, row_bytes = plan.slot_bytes, plan.d_model * plan.element
    matrices, neurons, rows = plan.matrices, plan.neurons, plan.rows
    copy_row = make_copy_row(plan, dev)

    @dev.device_function
    def copy_rows(packet, matrix, first, step, begin, end, tid):
        """Rows ``first + i * step`` of a dense matrix for i from ``begin``, zeros from ``end`` on."""
        for j in range(rows):
            i = begin + j
            wanted = i < end
            row = first + i * step if wanted else 0
            copy_row(packet + j * slot, matrix + row * row_bytes, tid, wanted)

    @dev.device_function
    def copy_neuron(packet, j, entry, wanted, a, b, down, tid):
        """Rows of one active neuron; the packet holds all rows of ``a``, then of ``b``, then of the down projection."""
        offset = (entry & NEURON) * row_bytes if wanted else 0
        if matrices >= 2:
            copy_row(packet + j * slot, a + offset, tid, wanted)
        if matrices == 3:
            copy_row(packet + (neurons + j) * slot, b + offset, tid, wanted)
        copy_row(packet + ((matrices - 1) * neurons + j) * slot, down + offset, tid, wanted)

    return SimpleNamespace(copy_rows=copy_rows, copy_neuron=copy_neuron)


def make_tokens(plan: Plan, dev: Any) -> SimpleNamespace:
    """Device functions that bring x into shared memory, each thread its own pieces: ``load_x``, ``copy_x``."""
    chunks, threads, pieces, tokens = plan.chunks, plan.threads, plan.pieces, plan.batch
    whole, at = chunks * threads == pieces, plan.shared
    copy, zero4 = dev.make_copy(plan.hint), (np.int32(0), np.int32(0), np.int32(0), np.int32(0))

    @dev.device_function
    def load_x(shared, x, n_tokens, tid):
        """Each thread's pieces of x, as stored; only the thread itself reads them."""
        for t in range(tokens):
            for c in range(chunks):
                piece = tid + c * threads
                words = zero4
                if t < n_tokens and (whole or piece < pieces):
                    words = dev.load16(x + (t * pieces + piece) * 16)
                dev.shared_store16(shared + at.x + (t * chunks * threads + piece) * 16, words)

    @dev.device_function
    def copy_x(shared, x, n_tokens, tid):
        """The same by copies of the first group: before the weights in the queue, or x would arrive behind them."""
        for t in range(tokens):
            for c in range(chunks):
                piece = tid + c * threads
                size = 16 if t < n_tokens and (whole or piece < pieces) else 0
                copy(shared + at.x + (t * chunks * threads + piece) * 16, x + (t * pieces + piece) * size, size)

    return SimpleNamespace(load_x=load_x, copy_x=copy_x)
