"""Device code after the choice: the block's work list, the rows of its neurons in the other matrices, the sum of y."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.ring import HOLE, make_activation, make_block_sum, make_stream, make_sync


def make_recall(plan: Plan, dev: Any) -> Any:
    """``recall(...)``: the block's list and its length when the logits were computed by another kernel."""
    threads, work_at = plan.threads, plan.shared["work"]
    counts_ws, index_ws, wait_for = plan.workspace["counts"], plan.workspace["index"], dev.wait_tagged_i32
    store, sync = dev.shared_store_i32, dev.syncthreads

    @dev.device_function
    def recall(shared, workspace, block, first, epoch, tid):
        found = wait_for(workspace + counts_ws + block * 8, epoch)
        for i in range(tid, found, threads):
            store(shared + work_at + i * 4, wait_for(workspace + index_ws + (first + i) * 8, epoch))
        sync()
        return found

    return recall


def make_take(plan: Plan, dev: Any) -> Any:
    """``take(...)``: the block's share of a list given by the caller; returns the entries beyond the held places."""
    n_blocks, threads, tokens, held_places, d_ff = plan.n_blocks, plan.threads, plan.batch, plan.held, plan.d_ff
    neurons = plan.neurons
    work_at, work_value_at, valued = plan.shared["work"], plan.shared["work_value"], plan.kind == "down"
    load_value, size = dev.make_load_narrow(plan.value_dtype), 4 if plan.value_dtype == "float32" else 2
    global_i, store_i, store_f = dev.load_i32, dev.shared_store_i32, dev.shared_store_f32
    everyone = ((1 << plan.batch) - 1) << 24
    sync = dev.syncthreads

    @dev.device_function
    def take(shared, indices, values, count, stride, block, tid):
        total = min(max(global_i(count), 0), d_ff)
        base, extra = total // n_blocks, total % n_blocks
        begin, mine = block * base + min(block, extra), base + (1 if block < extra else 0)
        for i in range(tid, mine, threads):
            store_i(shared + work_at + i * 4, global_i(indices + (begin + i) * 4) | everyone)
            if valued:
                for t in range(tokens):
                    value = load_value(values + (t * stride + begin + i) * size)
                    store_f(shared + work_value_at + (i * tokens + t) * 4, value)
        if tid < neurons:  # the last packet may not be full
            store_i(shared + work_at + (mine + tid) * 4, HOLE)
        sync()
        return max(0, mine - held_places)

    return take


def make_coefficients(plan: Plan, dev: Any) -> Any:
    """``coefficients(...)``: v of the packet's ``n`` neurons and tokens, lane by lane, zero where a token drops a neuron."""
    tokens, kind, gate = plan.batch, plan.kind, plan.first == "gate"
    mask = plan.list_size - 1 if kind == "threshold" else -1  # the list of ``threshold`` is a circle
    width, activation = (1 if kind == "down" else 32 // plan.sparse_sums), make_activation(plan, dev)
    work_at, work_value_at, zero = plan.shared["work"], plan.shared["work_value"], np.float32(0.0)
    load_i, load_f, lane_xor = dev.shared_load_i32, dev.shared_load_f32, dev.lane_xor

    @dev.device_function
    def coefficients(shared, total, place, n, tid):
        number = (tid & 31) // width
        v = total
        if kind == "predictor" or kind == "given":
            v = activation(total) * lane_xor(total, 16)
        if number >= n * tokens:
            return zero
        at, token = (place + number // tokens) & mask, number % tokens
        entry = load_i(shared + work_at + at * 4)
        if entry == HOLE or (entry >> (24 + token)) & 1 == 0:
            return zero
        if kind == "threshold" or kind == "down":
            value = load_f(shared + work_value_at + (at * tokens + token) * 4)
            if kind == "down":
                v = value
            elif gate:
                v = value * total
            else:
                v = activation(total) * value
        return v

    return coefficients


def make_packets(plan: Plan, dev: Any) -> tuple[Any, Any]:
    """``use(...)``: add ``v`` times the rows of W_down of a packet of the work list to y; returns y and the scratch parity.

    ``copy_work(...)``: copy the rows of a packet's neurons.
    """
    neurons, matrices, down_at = plan.neurons, plan.matrices, (plan.matrices - 1) * plan.neurons * plan.slot_bytes
    x_at, scratch_at, work_at, scratch_bytes = (
        *(plan.shared[k] for k in ("x", "scratch", "work")),
        plan.scratch_floats * 4,
    )
    layout = (plan.batch, plan.chunks, plan.slot_bytes, plan.chunk_bytes)
    dot = dev.make_rows_dot(plan.dtype, max(1, (matrices - 1) * neurons), *layout)
    add, load_i = dev.make_rows_add(plan.dtype, neurons, *layout), dev.shared_load_i32
    block_sum, coefficients = make_block_sum(plan, dev, plan.sparse_sums), make_coefficients(plan, dev)
    spread = dev.make_lanes_spread(neurons * plan.batch, 1 if matrices == 1 else 32 // plan.sparse_sums)
    copy_neuron, nothing = make_stream(plan, dev).copy_neuron, np.float32(0.0)

    @dev.device_function
    def copy_work(shared, packet, p, end, a, b, down, tid):
        for j in range(neurons):
            at, entry = p * neurons + j, HOLE
            if at < end:
                entry = load_i(shared + work_at + at * 4)
            copy_neuron(packet, j, entry, entry != HOLE, a, b, down, tid)

    @dev.device_function
    def use(shared, packet, p, parity, y, tid):
        if load_i(shared + work_at + p * neurons * 4) != HOLE:
            total = nothing
            if matrices > 1:
                partial = dot(packet + tid * 16, shared + x_at + tid * 16)
                total = block_sum(shared + scratch_at + parity * scratch_bytes, tid, partial)
                parity ^= 1
            v = spread(coefficients(shared, total, p * neurons, neurons, tid))
            y = add(packet + down_at + tid * 16, v, y)
        return y, parity

    return use, copy_work


def make_sparse(plan: Plan, dev: Any) -> tuple[Any, Any]:
    """``sparse(...)``: stream the rows of the work list, its held places and ``taken`` more; returns the thread's y.

    ``start(...)``: first packets of a kernel that begins with its work list ready.
    """
    neurons, depth, held_places, ring_at = plan.neurons, plan.depth, plan.held, plan.shared["ring"]
    packet_bytes, (use, copy_work) = plan.slots * plan.slot_bytes, make_packets(plan, dev)
    zeros = dev.make_zeros(plan.batch * plan.chunks * plan.vector)
    commit, wait, drain = dev.copy_commit, dev.make_copy_wait(plan.depth - 1), dev.make_copy_wait(0)

    @dev.device_function
    def sparse(shared, taken, ring, parity, a, b, down, tid):
        y = zeros()
        for p in range(depth + (taken + neurons - 1) // neurons):
            packet = shared + ring_at + ring * packet_bytes
            wait()
            y, parity = use(shared, packet, p, parity, y, tid)
            copy_work(shared, packet, p + depth, held_places + taken, a, b, down, tid)
            commit()
            ring = ring + 1 if ring + 1 < depth else 0
        drain()  # the reduction uses the ring's memory
        return y

    @dev.device_function
    def start(shared, a, b, down, tid):
        for p in range(depth):
            copy_work(shared, shared + ring_at + p * packet_bytes, p, held_places, a, b, down, tid)
            commit()

    return sparse, start


def make_store_partial(plan: Plan, dev: Any) -> Any:
    """``store_partial(...)``: write the block's share of y, fp32, to the workspace."""
    threads, pieces, chunks, vector = plan.threads, plan.pieces, plan.chunks, plan.vector
    partial_ws, block_bytes = plan.workspace["partial"], plan.batch * plan.d_model * 4
    store = dev.make_store_columns(
        plan.dtype, plan.batch, plan.chunks, plan.d_model * 4, plan.threads * plan.vector * 4
    )

    @dev.device_function
    def store_partial(workspace, block, y, tid):
        mine = min(chunks, (pieces - tid + threads - 1) // threads) if tid < pieces else 0
        store(workspace + partial_ws + block * block_bytes + tid * vector * 4, y, mine)

    return store_partial


def make_reduce(plan: Plan, dev: Any) -> Any:
    """``reduce(...)``: sum all blocks' shares of this block's columns in a fixed order, add the residual, store y."""
    n_blocks, groups, mine, lanes = plan.n_blocks, plan.column_groups, plan.block_groups, plan.column_lanes
    warps, threads, d_model, size = plan.warps, plan.threads, plan.d_model, plan.element
    rows_at_once = plan.warps * (32 // plan.column_lanes)
    partial_ws, row_bytes, ring_at = plan.workspace["partial"], plan.batch * plan.d_model * 4, plan.shared["ring"]
    total_of = dev.make_sum_strided(-(-plan.n_blocks // rows_at_once), rows_at_once * row_bytes)
    load_f, store_f, lane_xor = dev.shared_load_f32, dev.shared_store_f32, dev.lane_xor
    load_residual, store_y, zero = dev.make_load_narrow(plan.dtype), dev.make_store_narrow(plan.dtype), np.float32(0.0)
    sync = make_sync(plan, dev)

    @dev.device_function
    def reduce(shared, workspace, residual, y, n_tokens, block, tid):
        lane, warp, columns = tid & 31, tid >> 5, shared + ring_at
        group, row = lane % lanes, warp * (32 // lanes) + lane // lanes
        for first in range(block * mine, groups, n_blocks * mine):
            count = 0
            if group < mine and first + group < groups and row < n_blocks:
                count = (n_blocks - row + rows_at_once - 1) // rows_at_once
            address = workspace + partial_ws
            if count > 0:
                address += row * row_bytes + (first + group) * 16
            s0, s1, s2, s3 = total_of(address, count)
            mask = lanes
            while mask < 32:
                s0 += lane_xor(s0, mask)
                s1 += lane_xor(s1, mask)
                s2 += lane_xor(s2, mask)
                s3 += lane_xor(s3, mask)
                mask *= 2
            if lane < lanes:
                place = columns + (warp * lanes + lane) * 16
                store_f(place, s0)
                store_f(place + 4, s1)
                store_f(place + 8, s2)
                store_f(place + 12, s3)
            sync()
            for i in range(tid, mine * 4, threads):
                at = first * 4 + i
                if at < n_tokens * d_model:
                    total = zero
                    for w in range(warps):
                        total += load_f(columns + (w * lanes * 4 + i) * 4)
                    if residual != 0:
                        total += load_residual(residual + at * size)
                    store_y(y + at * size, total)
            sync()

    return reduce
