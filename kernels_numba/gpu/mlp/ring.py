"""Device code shared by all kernels: the stream of weight rows through shared memory, block sums, the grid barrier.

Each thread copies its own 16 bytes of every row into its own place of a ring of ``depth`` packets and reads them back
itself, so arriving data needs no barrier; ``depth`` packets are in flight whatever the phase.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.plan import STAMPS, Plan

NEURON = (1 << 24) - 1  # a list entry: neuron in the low 24 bits, bit 24 + t set if token t keeps it; -1 is a hole
HOLE = -1


def make_sync(plan: Plan, dev: Any) -> Any:
    """``sync()``: barrier of the threads that work on rows."""
    return dev.make_barrier(plan.threads) if plan.claims else dev.syncthreads


def make_block_sum(plan: Plan, dev: Any, sums: int) -> Any:
    """``block_sum(scratch, tid, values)``: sums over the block of ``sums`` values; lane l gets number l // (32 / sums).

    One barrier inside; consecutive calls must use different scratch areas.
    """
    width, warps, rounds = 32 // sums, plan.warps, -(-plan.warps // (32 // sums))
    lanes_sum, fold = dev.make_lanes_sum(sums), dev.make_lanes_fold(32 // sums)
    load, store = dev.shared_load_f32, dev.shared_store_f32
    sync = make_sync(plan, dev)

    @dev.device_function
    def block_sum(scratch, tid, values):
        lane, warp = tid & 31, tid >> 5
        number, part = lane // width, lane % width
        mine = lanes_sum(values)
        if part == 0:
            store(scratch + (((warp // width) * sums + number) * width + warp % width) * 4, mine)
        sync()
        total = np.float32(0.0)
        for i in range(rounds):
            if i * width + part < warps:
                total += load(scratch + ((i * sums + number) * width + part) * 4)
        return fold(total)

    return block_sum


def make_activation(plan: Plan, dev: Any) -> Any:
    """``act(g)`` in fp32; both are g * sigmoid(p), with p = g for SiLU and twice the argument of tanh for GELU."""
    exp2, divide, gelu = dev.exp2, dev.divide, plan.activation == "gelu_tanh"
    one, minus_log2e = np.float32(1.0), np.float32(-1.4426950408889634)
    outer, inner = np.float32(1.5957691216057308), np.float32(0.044715)  # 2 sqrt(2 / pi)

    @dev.device_function
    def activation(g):
        p = g
        if gelu:
            p = outer * (g + inner * g * g * g)
        return divide(g, one + exp2(p * minus_log2e))

    return activation


def make_flags(plan: Plan, dev: Any) -> SimpleNamespace:
    """Barrier of all blocks without a common counter: one 64-bit word a block, the number of the launch in its upper half.

    ``epoch(workspace, block)``: number of this launch, one more than the block's last; nothing is ever cleared.
    ``raise_flag(words, block, epoch, tid)``: all the block wrote before is visible to who has seen the word.
    ``wait(words, epoch, tid)``: until every block's word has this epoch.
    """
    n_blocks, threads, done_ws, sync = plan.n_blocks, plan.threads, plan.workspace["done"], make_sync(plan, dev)
    load, store, spins = dev.flag_load, dev.flag_store, dev.SPIN_LIMIT

    @dev.device_function
    def epoch(workspace, block):
        return ((load(workspace + done_ws + block * 8) >> 32) + 1) & 0x7FFFFFFF

    @dev.device_function
    def raise_flag(words, block, now, tid):
        sync()
        if tid == 0:
            store(words + block * 8, now << 32)

    @dev.device_function
    def wait(words, now, tid):
        for i in range(tid, n_blocks, threads):
            word, left = load(words + i * 8), spins
            while (word >> 32) != now and left != 0:
                word = load(words + i * 8)
                left -= 1
        sync()

    return SimpleNamespace(epoch=epoch, raise_flag=raise_flag, wait=wait)


def make_stamp(plan: Plan, dev: Any) -> Any:
    """``stamp(workspace, block, k, tid)``: note the clock as stamp number k, in a traced kernel; else nothing."""
    traced, trace_ws, store, n = plan.trace, plan.workspace["trace"], dev.store_clock, len(STAMPS)

    @dev.device_function
    def stamp(workspace, block, k, tid):
        if traced and tid == 0:
            store(workspace + trace_ws + (block * n + k) * 8)

    return stamp


def make_stream(plan: Plan, dev: Any) -> SimpleNamespace:
    """Device functions that fill the ring: ``copy_row``, ``copy_rows``, ``copy_neuron``, ``load_x``, ``copy_x``."""
    chunks, threads, pieces, tokens = plan.chunks, plan.threads, plan.pieces, plan.batch
    whole = chunks * threads == pieces
    slot, row_bytes = plan.slot_bytes, plan.d_model * plan.element
    matrices, neurons, rows = plan.matrices, plan.neurons, plan.rows
    copy, load16, store16 = dev.make_copy(plan.hint), dev.load16, dev.shared_store16
    x_at = plan.shared["x"]
    zero4 = (np.int32(0), np.int32(0), np.int32(0), np.int32(0))

    @dev.device_function
    def copy_row(place, row, tid, wanted):
        for c in range(chunks):
            piece = tid + c * threads
            size = 16 if wanted and (whole or piece < pieces) else 0
            copy(place + piece * 16, row + piece * size, size)  # size 0: an address that exists

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

    @dev.device_function
    def load_x(shared, x, n_tokens, tid):
        """Each thread's pieces of x, as stored; only the thread itself reads them."""
        for t in range(tokens):
            for c in range(chunks):
                piece = tid + c * threads
                words = zero4
                if t < n_tokens and (whole or piece < pieces):
                    words = load16(x + (t * pieces + piece) * 16)
                store16(shared + x_at + (t * chunks * threads + piece) * 16, words)

    @dev.device_function
    def copy_x(shared, x, n_tokens, tid):
        """The same by copies of the first group: before the weights in the queue, or x would arrive behind them."""
        for t in range(tokens):
            for c in range(chunks):
                piece = tid + c * threads
                size = 16 if t < n_tokens and (whole or piece < pieces) else 0
                copy(shared + x_at + (t * chunks * threads + piece) * 16, x + (t * pieces + piece) * size, size)

    return SimpleNamespace(
        copy_row=copy_row, copy_rows=copy_rows, copy_neuron=copy_neuron, load_x=load_x, copy_x=copy_x
    )
