"""Device code of CATS and M-COUNTDOWN: one loop for the dense rows that choose and for the rows of the neurons they find.

The next free packet of the ring takes the rows of neurons if enough of them are waiting, else the next dense rows, so
the stream of weights never pauses and the blocks end together: a block that finds more claims less (``work_queue``).
One thread notes what a packet holds and which dense packet is next; the others read it behind the next packet's barrier.
It is of the last warp: the first has the list of found neurons to write at the same time.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.grid_barrier import make_flags, make_sync
from kernels_numba.gpu.mlp.low_rank import make_choice, make_share_z
from kernels_numba.gpu.mlp.plan import RESERVE, Plan
from kernels_numba.gpu.mlp.reduce import make_block_sum
from kernels_numba.gpu.mlp.ring import make_ring, make_tokens
from kernels_numba.gpu.mlp.sparse_rows import make_activation, make_coefficients
from kernels_numba.gpu.mlp.trace import make_stamp
from kernels_numba.gpu.mlp.work_list import HOLE, NEURON
from kernels_numba.gpu.mlp.work_queue import make_clear_counter, make_packet_numbers

_DENSE = 1  # kinds of packets in flight, 4 bits each: 0 nothing, 1 dense rows, 1 + n the rows of n neurons


def make_factors(plan: Plan, dev: Any) -> SimpleNamespace:
    """``copy(...)``: the factors of a dense packet's rows, on their way with the rows; ``score(...)``: of a row.

    Behind the ring's copies a load would take 3 to 10 us. A faster warp refills the packet while others still look at its
    factors, so ``turn`` runs through one place more than there are packets; the next barrier lies before its next use.
    """
    scaled, rows, depth, d_ff, first, at = plan.scaled, plan.rows, plan.depth, plan.d_ff, plan.clerk, plan.shared
    low, tokens, factor = plan.low_rank, plan.batch, make_choice(plan, dev).factor

    @dev.device_function
    def copy(shared, scale, turn, begin, tid):
        if scaled and first <= tid < first + rows and begin + tid - first < d_ff:
            i = tid - first
            dev.copy4(shared + at.factors + (turn * rows + i) * 4, scale + (begin + i) * 4)

    @dev.device_function
    def score(shared, magnitude, turn, row, token):
        if scaled:
            magnitude *= dev.shared_load_f32(shared + at.factors + (turn * rows + row) * 4)
        if low:
            magnitude *= factor(shared, turn, row * tokens + token)
        return magnitude

    @dev.device_function
    def next_turn(turn):
        if scaled:
            turn = turn + 1 if turn < depth else 0
        return turn

    return SimpleNamespace(copy=copy, score=score, next_turn=next_turn)


def make_append(plan: Plan, dev: Any) -> Any:
    """``append(...)``: add the kept rows of a dense packet to the block's circular list; returns how many it has taken in all.

    A row is kept if any token keeps it (not score < threshold, so NaN is kept); its entry says which tokens do. Every
    warp counts the same; warp 0 writes.
    """
    tokens, width, mask, d_ff = plan.batch, 32 // plan.dense_sums, plan.list_size - 1, plan.d_ff
    activation, gate, at, area = make_activation(plan, dev), plan.first == "gate", plan.shared, plan.workspace
    score = make_factors(plan, dev).score

    @dev.device_function
    def append(shared, workspace, total, begin, turn, found, threshold, n_tokens, tid):
        lane = tid & 31
        number, part = lane // width, lane % width
        row, token = number // tokens, number % tokens
        value = activation(total) if gate else total
        wanted = (
            begin + row < d_ff and token < n_tokens and not (score(shared, abs(value), turn, row, token) < threshold)
        )
        bits = dev.ballot(wanted and part == 0)
        keepers = 0
        for t in range(tokens):
            keepers |= ((bits >> ((row * tokens + t) * width)) & 1) << t
        kept = dev.ballot(keepers != 0 and part == 0 and token == 0)
        if tid < 32 and part == 0:
            if token == 0 and begin + row < d_ff:
                dev.store_i32(workspace + area.kept + (begin + row) * 4, keepers)
            if keepers != 0:
                place = (found + dev.popcount(kept & ((1 << (row * tokens * width)) - 1))) & mask
                dev.shared_store_f32(shared + at.work_value + (place * tokens + token) * 4, value)
                if token == 0:
                    dev.shared_store_i32(shared + at.work + place * 4, (begin + row) | (keepers << 24))
        return found + dev.popcount(kept)

    return append


def make_append_kept(plan: Plan, dev: Any) -> Any:
    """``append_kept(...)``: the same from a packet whose sums were kept until its factors came."""
    append, choice = make_append(plan, dev), make_choice(plan, dev)
    kept_total, kept_row = choice.total, choice.first_row

    @dev.device_function
    def append_kept(shared, workspace, chosen, found, threshold, n_tokens, tid):
        total, begin = kept_total(shared, chosen, tid), kept_row(shared, chosen)
        return append(shared, workspace, total, begin, chosen, found, threshold, n_tokens, tid) & NEURON

    return append_kept


def make_use(plan: Plan, dev: Any) -> SimpleNamespace:
    """``dense(...)``: dot products of a dense packet; ``sparse(...)``: y with a packet of neurons added."""
    layout = (plan.batch, plan.chunks, plan.slot_bytes, plan.chunk_bytes)
    rows_dot = dev.make_rows_dot(plan.dtype, plan.rows, *layout)
    dot = dev.make_rows_dot(plan.dtype, plan.neurons, *layout)
    add = dev.make_rows_add(plan.dtype, plan.neurons, *layout)
    dense_sum, sparse_sum = make_block_sum(plan, dev, plan.dense_sums), make_block_sum(plan, dev, plan.sparse_sums)
    coefficients, down_at, at = make_coefficients(plan, dev), plan.neurons * plan.slot_bytes, plan.shared
    spread = dev.make_lanes_spread(plan.neurons * plan.batch, 32 // plan.sparse_sums)

    @dev.device_function
    def dense(shared, packet, scratch, tid):
        return dense_sum(scratch, tid, rows_dot(packet + tid * 16, shared + at.x + tid * 16))

    @dev.device_function
    def sparse(shared, packet, scratch, place, n, y, tid):
        total = sparse_sum(scratch, tid, dot(packet + tid * 16, shared + at.x + tid * 16))
        v = spread(coefficients(shared, total, place, n, tid))
        return add(packet + down_at + tid * 16, v, y)

    return SimpleNamespace(dense=dense, sparse=sparse)


def make_copy_found(plan: Plan, dev: Any) -> Any:
    """``copy_found(...)``: copy the rows of ``n`` neurons from place ``head`` of the list on."""
    neurons, at, mask, copy_neuron = plan.neurons, plan.shared, plan.list_size - 1, make_ring(plan, dev).copy_neuron

    @dev.device_function
    def copy_found(shared, packet, head, n, a, b, down, tid):
        for j in range(neurons):
            entry = HOLE
            if j < n:
                entry = dev.shared_load_i32(shared + at.work + ((head + j) & mask) * 4)
            copy_neuron(packet, j, entry, j < n, a, b, down, tid)

    return copy_found


def make_fill(plan: Plan, dev: Any) -> Any:
    """``fill(...)``: the block's dense packets from ``first`` to ``end``, on their way; returns their kinds."""
    rows, d_ff, n_blocks = plan.rows, plan.d_ff, plan.n_blocks
    packet_bytes, at, clerk, copy_rows = plan.packet_bytes, plan.shared, plan.clerk, make_ring(plan, dev).copy_rows
    copy_factors = make_factors(plan, dev).copy

    @dev.device_function
    def fill(shared, dense_rows, scale, first, end, block, tid):
        kinds = 0
        for p in range(first, end):
            begin = (block + p * n_blocks) * rows
            if tid == clerk:
                dev.shared_store_i32(shared + at.begins + p * 4, begin)
            if begin < d_ff:
                copy_rows(shared + at.ring + p * packet_bytes, dense_rows, 0, 1, begin, d_ff, tid)
                copy_factors(shared, scale, p, begin, tid)
                kinds |= _DENSE << (4 * p)
            dev.copy_commit()
        return kinds

    return fill


def make_begin(plan: Plan, dev: Any) -> Any:
    """``begin(...)``: the first packets and x on their way; returns the kinds of the packets and the epoch."""
    overlap, fill, stamp = plan.overlap, make_fill(plan, dev), make_stamp(plan, dev)
    tokens, read_epoch = make_tokens(plan, dev), make_flags(plan, dev).epoch
    load_x, copy_x, clear_counter = tokens.load_x, tokens.copy_x, make_clear_counter(plan, dev)
    projects, depth, share_z = plan.projects, plan.depth, make_share_z(plan, dev)
    start, finish, before_x = share_z.start, share_z.finish, plan.depth - 1 if plan.projects else plan.depth

    @dev.device_function
    def begin(shared, workspace, x, dense_rows, v, scale, n_tokens, block, tid):
        if not overlap:
            copy_x(shared, x, n_tokens, tid)
        if projects:
            start(shared, v, block, tid)
        kinds = fill(shared, dense_rows, scale, 0, before_x, block, tid)
        if overlap:
            dev.grid_dependency_wait()
        epoch = read_epoch(workspace, block)
        if overlap:
            load_x(shared, x, n_tokens, tid)
        stamp(workspace, block, 1, tid)
        clear_counter(workspace, epoch, block, tid)
        if projects:
            finish(shared, workspace, v, epoch, block, tid)
            kinds |= fill(shared, dense_rows, scale, before_x, depth, block, tid)
        return kinds, epoch

    return begin


def make_note(plan: Plan, dev: Any) -> Any:
    """``note(...)``, by the clerk: which dense packet the block's i-th is, for the other threads and for the warp of factors."""
    numbers, low, ask = make_packet_numbers(plan, dev), plan.low_rank, make_choice(plan, dev).note
    note_number, number = numbers.note, numbers.number

    @dev.device_function
    def note(shared, i, block):
        note_number(shared, i, block)
        if low:
            ask(shared, i, number(shared, i, block))

    return note


def make_refill(plan: Plan, dev: Any) -> Any:
    """``refill(...)``: the next neurons or dense rows into the packet that is free; (kinds, neurons begun, rows issued)."""
    rows, neurons, d_ff, packets, at = plan.rows, plan.neurons, plan.d_ff, plan.dense_packets, plan.shared
    newest, enough, clerk = 4 * (plan.depth - 1), RESERVE + plan.neurons, plan.clerk
    copy_rows, copy_found = make_ring(plan, dev).copy_rows, make_copy_found(plan, dev)
    numbers, copy_factors, depth = make_packet_numbers(plan, dev), make_factors(plan, dev).copy, plan.depth
    note, number = make_note(plan, dev), numbers.number

    @dev.device_function
    def refill(
        shared, packet, ring, turn, kinds, waiting, begun, issued, following, dense_rows, a, b, down, scale, block, tid
    ):
        if waiting >= enough or (waiting > 0 and following >= packets):
            n = min(waiting, neurons)
            copy_found(shared, packet, begun, n, a, b, down, tid)
            if tid == clerk:
                dev.shared_store_i32(shared + at.begins + ring * 4, begun)
            begun += n
            kinds |= (_DENSE + n) << newest
        elif following < packets:
            copy_rows(packet, dense_rows, 0, 1, following * rows, d_ff, tid)
            copy_factors(shared, scale, turn - 1 if turn > 0 else depth, following * rows, tid)
            kinds |= _DENSE << newest
            issued += 1
            if tid == clerk:
                # ``following`` read again: kept, it costs 8 tokens in fp32 a spill
                dev.shared_store_i32(shared + at.begins + ring * 4, number(shared, issued - 1, block) * rows)
                note(shared, issued, block)
        dev.copy_commit()
        return kinds, begun, issued

    return refill


def make_choose_and_add(plan: Plan, dev: Any) -> Any:
    """``choose_and_add(...)``: the whole stream; returns the thread's share of y, the neurons found, and the epoch."""
    depth, packets, packet_bytes, clerk = plan.depth, plan.dense_packets, plan.packet_bytes, plan.clerk
    at, scratch_bytes, nothing = plan.shared, plan.scratch_floats * 4, np.float32(0.0)
    start, refill, append = make_begin(plan, dev), make_refill(plan, dev), make_append(plan, dev)
    use, numbers, sync = make_use(plan, dev), make_packet_numbers(plan, dev), make_sync(plan, dev)
    dense, sparse, note, number = use.dense, use.sparse, make_note(plan, dev), numbers.number
    next_turn, choice, low = make_factors(plan, dev).next_turn, make_choice(plan, dev), plan.low_rank
    keep, due, receive, append_kept = choice.keep, choice.due, choice.receive, make_append_kept(plan, dev)
    zeros = dev.make_zeros(plan.batch * plan.chunks * plan.vector)
    wait, drain = dev.make_copy_wait(plan.depth - 1), dev.make_copy_wait(0)

    @dev.device_function
    def choose_and_add(shared, workspace, x, w, a, v, down, scale, threshold, n_tokens, block, tid):
        kinds, epoch = start(shared, workspace, x, w, v, scale, n_tokens, block, tid)
        y, ring, turn, parity, issued, found, begun, following = zeros(), 0, 0, 0, depth, 0, 0, 0
        used, chosen, choose = 0, 0, False
        if tid == clerk:
            note(shared, issued, block)
        sync()
        while kinds != 0 or following < packets or begun < found or (low and chosen < used):
            packet, scratch = shared + at.ring + ring * packet_bytes, shared + at.scratch + parity * scratch_bytes
            kind, total, waiting = kinds & 15, nothing, found - begun
            begin = dev.shared_load_i32(shared + at.begins + ring * 4)
            if low:
                choose = due(chosen, used, issued, following)
                if choose:
                    receive(shared, chosen, tid)
            wait()
            if kind == _DENSE:
                total = dense(shared, packet, scratch, tid)
            elif kind != 0:
                y = sparse(shared, packet, scratch, begin, kind - _DENSE, y, tid)
            else:
                sync()  # what warp 0 found last
            following = number(shared, issued, block)
            kinds, parity = kinds >> 4, parity ^ 1
            kinds, begun, issued = refill(
                shared, packet, ring, turn, kinds, waiting, begun, issued, following, w, a, v, down, scale, block, tid
            )
            ring = ring + 1 if ring + 1 < depth else 0
            if low:
                # counts are 64 bits wide; that they fit into 24 saves a register each, of 56 that two blocks an SM leave
                issued, begun = issued & NEURON, begun & NEURON
                if kind == _DENSE:
                    keep(shared, used, total, begin, tid)
                    used = (used + 1) & NEURON
                if choose:
                    found = append_kept(shared, workspace, chosen, found, threshold, n_tokens, tid)
                    chosen = (chosen + 1) & NEURON
            elif kind == _DENSE:
                found = append(shared, workspace, total, begin, turn, found, threshold, n_tokens, tid)
            turn = next_turn(turn)
            if depth == 1:
                sync()  # with more in flight another packet's barrier comes before ``begin`` is read
        drain()  # the sum of y uses the ring's memory
        return y, found, epoch

    return choose_and_add
