"""Device code of the first phase: which neurons are active, by a dense projection or by a low-rank predictor.

Each block finds the active ones among its own rows, in order, and starts to copy their rows of the other matrices while
it still chooses ("held"): the stream of weights does not pause between the phases.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.gpu.plan import Plan
from kernels_numba.gpu.stream import HOLE, make_activation, make_block_sum, make_flags, make_stamp, make_stream


def make_hold(plan: Plan, dev: Any) -> Any:
    """``hold(...)``: copy the rows of the next found neurons into the packet; returns how many are held now."""
    neurons, tokens, stream = plan.neurons, plan.batch, make_stream(plan, dev)
    found_at, value_at = plan.shared["found"], plan.shared["found_value"]
    work_at, work_value_at, valued = plan.shared["work"], plan.shared["work_value"], plan.kind == "threshold"
    load_i, load_f, store_i, store_f = (
        dev.shared_load_i32,
        dev.shared_load_f32,
        dev.shared_store_i32,
        dev.shared_store_f32,
    )
    copy_neuron = stream.copy_neuron

    @dev.device_function
    def hold(shared, packet, place, found, held, a, b, down, tid):
        for j in range(neurons):
            i = held + j
            wanted = i < found
            entry = HOLE
            if wanted:
                entry = load_i(shared + found_at + i * 4)
                if tid == 0:
                    at = place * neurons + j
                    store_i(shared + work_at + at * 4, entry)
                    if valued:
                        for t in range(tokens):
                            value = load_f(shared + value_at + (i * tokens + t) * 4)
                            store_f(shared + work_value_at + (at * tokens + t) * 4, value)
            copy_neuron(packet, j, entry, wanted, a, b, down, tid)
        return max(held, min(held + neurons, found))

    return hold


def make_append(plan: Plan, dev: Any) -> Any:
    """``append(...)``: add the kept rows of a dense packet to the block's list; returns its new length.

    A row is kept if any token keeps it (not score < threshold, so NaN is kept); its entry says which tokens do. Every
    warp counts the same; warp 0 writes.
    """
    tokens, width = plan.batch, 32 // plan.dense_sums
    index_ws, value_ws = plan.workspace["index"], plan.workspace["value"]
    found_at, value_at, gate = plan.shared["found"], plan.shared["found_value"], plan.first == "gate"
    ballot, popcount, activation = dev.ballot, dev.popcount, make_activation(plan, dev)
    shared_f, shared_i, global_f, global_i = dev.shared_store_f32, dev.shared_store_i32, dev.store_f32, dev.store_i32

    @dev.device_function
    def append(shared, workspace, total, first, begin, end, found, threshold, n_tokens, tid):
        lane = tid & 31
        number, part = lane // width, lane % width
        row, token = number // tokens, number % tokens
        value = activation(total) if gate else total
        wanted = begin + row < end and token < n_tokens and not (abs(value) < threshold)
        bits = ballot(wanted and part == 0)
        keepers = 0
        for t in range(tokens):
            keepers |= ((bits >> ((row * tokens + t) * width)) & 1) << t
        kept = ballot(keepers != 0 and part == 0 and token == 0)
        place = found + popcount(kept & ((1 << (row * tokens * width)) - 1))
        if tid < 32 and part == 0 and keepers != 0:
            shared_f(shared + value_at + (place * tokens + token) * 4, value)
            global_f(workspace + value_ws + ((first + place) * tokens + token) * 4, value)
            if token == 0:
                entry = (first + begin + row) | (keepers << 24)
                shared_i(shared + found_at + place * 4, entry)
                global_i(workspace + index_ws + (first + place) * 4, entry)
        return found + popcount(kept)

    return append


def make_threshold_select(plan: Plan, dev: Any) -> Any:
    """``select(...)`` of CATS and M-COUNTDOWN; returns (found, held, ring packet, scratch parity, epoch)."""
    rows, depth, packet_bytes = plan.rows, plan.depth, plan.slots * plan.slot_bytes
    ring_at, x_at, scratch_at, scratch_bytes = (
        plan.shared["ring"],
        plan.shared["x"],
        plan.shared["scratch"],
        plan.scratch_floats * 4,
    )
    stream, hold, append = make_stream(plan, dev), make_hold(plan, dev), make_append(plan, dev)
    copy_rows, load_x, copy_x, overlap = stream.copy_rows, stream.load_x, stream.copy_x, plan.overlap
    commit, wait = dev.copy_commit, dev.make_copy_wait(plan.depth - 1)
    block_sum, ready = make_block_sum(plan, dev, plan.dense_sums), dev.grid_dependency_wait
    read_epoch = make_flags(plan, dev).epoch
    dot = dev.make_rows_dot(plan.dtype, rows, plan.batch, plan.chunks, plan.slot_bytes, plan.chunk_bytes)

    stamp = make_stamp(plan, dev)

    @dev.device_function
    def select(shared, workspace, x, dense, a, b, down, first, end, threshold, n_tokens, block, tid):
        steps = (end + rows - 1) // rows
        if not overlap:
            copy_x(shared, x, n_tokens, tid)
        for p in range(depth):
            if p < steps:
                copy_rows(shared + ring_at + p * packet_bytes, dense, first, 1, p * rows, end, tid)
            commit()
        if overlap:
            ready()
            load_x(shared, x, n_tokens, tid)
        stamp(workspace, block, 1, tid)
        epoch = read_epoch(workspace, block)
        found, held, ring, parity = 0, 0, 0, 0
        for g in range(steps):
            packet = shared + ring_at + ring * packet_bytes
            wait()
            if g == 0:
                stamp(workspace, block, 2, tid)
            partial = dot(packet + tid * 16, shared + x_at + tid * 16)
            total = block_sum(shared + scratch_at + parity * scratch_bytes, tid, partial)
            parity ^= 1
            if g + depth < steps:
                copy_rows(packet, dense, first, 1, (g + depth) * rows, end, tid)
            else:
                held = hold(shared, packet, g + depth - steps, found, held, a, b, down, tid)
            commit()
            found = append(shared, workspace, total, first, g * rows, end, found, threshold, n_tokens, tid)
            ring = ring + 1 if ring + 1 < depth else 0
        return found, held, ring, parity, epoch

    return select


def make_logits(plan: Plan, dev: Any) -> tuple[Any, Any]:
    """``copy_logit_rows(...)`` fills a packet with rows of U; ``append_logits(...)`` adds its kept rows to the list."""
    tokens, warps, pieces = plan.batch, plan.warps, plan.rank_pieces
    per_slot, n_slots, slot = plan.logit_rows, plan.logit_slots, plan.slot_bytes
    sums, row_bytes, row_warps = plan.logit_slots * plan.batch, plan.rank_padded * plan.element, plan.rank_pieces // 32
    width = 32 // (1 << (sums - 1).bit_length())
    index_ws, found_at, z_at = plan.workspace["index"], plan.shared["found"], plan.shared["z"]
    dot = dev.make_rows_dot_f32(plan.dtype, n_slots, tokens, slot, plan.rank_padded * 4)
    lanes_sum, copy, vector = dev.make_lanes_sum(sums), dev.make_copy(plan.hint), plan.vector
    load_f, store_f, store_i, global_i = dev.shared_load_f32, dev.shared_store_f32, dev.shared_store_i32, dev.store_i32
    ballot, popcount, zero = dev.ballot, dev.popcount, np.float32(0.0)
    sync = dev.syncthreads

    @dev.device_function
    def copy_logit_rows(packet, u, first, begin, end, tid):
        sub, piece = tid // pieces, tid % pieces
        for s in range(n_slots):
            i = begin + s * per_slot + sub
            wanted = sub < per_slot and i < end
            row = first + i if wanted else 0
            copy(packet + s * slot + tid * 16, u + row * row_bytes + piece * 16, 16 if wanted else 0)

    @dev.device_function
    def append_logits(shared, workspace, scratch, packet, first, begin, end, found, threshold, n_tokens, tid):
        lane, warp = tid & 31, tid >> 5
        mine = lanes_sum(dot(packet + tid * 16, shared + z_at + (tid % pieces) * vector * 4))
        if lane % width == 0 and lane // width < sums:
            store_f(scratch + ((lane // width) * warps + warp) * 4, mine)
        sync()
        keepers = 0
        if lane < n_slots * per_slot and begin + lane < end:
            for t in range(tokens):
                at = scratch + (((lane // per_slot) * tokens + t) * warps + (lane % per_slot) * row_warps) * 4
                logit = zero
                for w in range(row_warps):
                    logit += load_f(at + w * 4)
                if t < n_tokens and not (logit < threshold):
                    keepers |= 1 << t
        kept = ballot(keepers != 0)
        if tid < 32 and keepers != 0:
            place = found + popcount(kept & ((1 << lane) - 1))
            entry = (first + begin + lane) | (keepers << 24)
            store_i(shared + found_at + place * 4, entry)
            global_i(workspace + index_ws + (first + place) * 4, entry)
        return found + popcount(kept)

    return copy_logit_rows, append_logits


def make_predictor_select(plan: Plan, dev: Any) -> Any:
    """``select(...)`` of the predictor methods: z = V x over the grid, a barrier, then the block's rows of U.

    The rows of U do not depend on z: they are on their way while the barrier is waited for. Returns as for a threshold.
    """
    rows, depth, packet_bytes, rank, n_blocks = (
        plan.rows,
        plan.depth,
        plan.slots * plan.slot_bytes,
        plan.rank,
        plan.n_blocks,
    )
    logits, threads, tokens, padded = plan.logit_rows * plan.logit_slots, plan.threads, plan.batch, plan.rank_padded
    ring_at, x_at, z_at, scratch_at = (plan.shared[k] for k in ("ring", "x", "z", "scratch"))
    z_ws, z_done_ws, scratch_bytes, width = (
        plan.workspace["z"],
        plan.workspace["z_done"],
        plan.scratch_floats * 4,
        32 // plan.dense_sums,
    )
    stream, hold = make_stream(plan, dev), make_hold(plan, dev)
    copy_rows, load_x, copy_x, overlap = stream.copy_rows, stream.load_x, stream.copy_x, plan.overlap
    copy_logit_rows, append_logits = make_logits(plan, dev)
    flags = make_flags(plan, dev)
    read_epoch, raise_flag, wait_grid = flags.epoch, flags.raise_flag, flags.wait
    commit, wait, ready = dev.copy_commit, dev.make_copy_wait(plan.depth - 1), dev.grid_dependency_wait
    block_sum, zero = make_block_sum(plan, dev, plan.dense_sums), np.float32(0.0)
    dot = dev.make_rows_dot(plan.dtype, rows, plan.batch, plan.chunks, plan.slot_bytes, plan.chunk_bytes)
    global_f, load_global, store_f = dev.store_f32, dev.load_f32, dev.shared_store_f32
    sync = dev.syncthreads

    @dev.device_function
    def fill(shared, packet, p, z_steps, steps, z_end, v, u, a, b, down, first, end, found, held, block, tid):
        if p < z_steps:
            copy_rows(packet, v, block, n_blocks, p * rows, z_end, tid)
        elif p < steps:
            copy_logit_rows(packet, u, first, (p - z_steps) * logits, end, tid)
        else:
            held = hold(shared, packet, p - steps, found, held, a, b, down, tid)
        commit()
        return held

    stamp = make_stamp(plan, dev)

    @dev.device_function
    def select(shared, workspace, x, v, u, a, b, down, first, end, threshold, n_tokens, block, tid):
        z_end = (rank - block + n_blocks - 1) // n_blocks if block < rank else 0
        z_steps = (z_end + rows - 1) // rows
        steps = z_steps + (end + logits - 1) // logits
        found, held, ring, parity = 0, 0, 0, 0
        if not overlap:
            copy_x(shared, x, n_tokens, tid)
        for p in range(depth):
            packet = shared + ring_at + p * packet_bytes
            if p < steps:
                fill(shared, packet, p, z_steps, steps, z_end, v, u, a, b, down, first, end, 0, 0, block, tid)
            else:
                commit()
        if overlap:
            ready()
            load_x(shared, x, n_tokens, tid)
        stamp(workspace, block, 1, tid)
        epoch = read_epoch(workspace, block)
        for g in range(z_steps):
            packet = shared + ring_at + ring * packet_bytes
            wait()
            partial = dot(packet + tid * 16, shared + x_at + tid * 16)
            total = block_sum(shared + scratch_at + parity * scratch_bytes, tid, partial)
            parity ^= 1
            fill(shared, packet, g + depth, z_steps, steps, z_end, v, u, a, b, down, first, end, 0, 0, block, tid)
            number = (tid & 31) // width
            i = g * rows + number // tokens
            if tid < 32 and tid % width == 0 and i < z_end:
                global_f(workspace + z_ws + ((number % tokens) * padded + block + i * n_blocks) * 4, total)
            ring = ring + 1 if ring + 1 < depth else 0
        raise_flag(workspace + z_done_ws, block, epoch, tid)
        wait_grid(workspace + z_done_ws, epoch, tid)
        stamp(workspace, block, 2, tid)
        for i in range(tid, tokens * padded, threads):
            value = zero
            if i % padded < rank:
                value = load_global(workspace + z_ws + i * 4)
            store_f(shared + z_at + i * 4, value)
        sync()
        for g in range(z_steps, steps):
            packet = shared + ring_at + ring * packet_bytes
            scratch = shared + scratch_at + parity * scratch_bytes
            wait()
            begin, before = (g - z_steps) * logits, found
            found = append_logits(
                shared, workspace, scratch, packet, first, begin, end, found, threshold, n_tokens, tid
            )
            parity ^= 1
            held = fill(
                shared, packet, g + depth, z_steps, steps, z_end, v, u, a, b, down, first, end, before, held, block, tid
            )
            ring = ring + 1 if ring + 1 < depth else 0
        return found, held, ring, parity, epoch

    return select
