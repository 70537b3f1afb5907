"""Device code after the choice: the rows of the work list's neurons in the other matrices, and their share of y."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.reduce import make_block_sum
from kernels_numba.gpu.mlp.ring import make_ring
from kernels_numba.gpu.mlp.work_list import HOLE


def make_activation(plan: Plan, dev: Any) -> Any:
    """``act(g)`` in fp32; both are g * sigmoid(p), with p = g for SiLU and twice the argument of tanh for GELU."""
    gelu = plan.activation == "gelu_tanh"
    one, minus_log2e = np.float32(1.0), np.float32(-1.4426950408889634)
    outer, inner = np.float32(1.5957691216057308), np.float32(0.044715)  # 2 sqrt(2 / pi)

    @dev.device_function
    def activation(g):
        p = g
        if gelu:
            p = outer * (g + inner * g * g * g)
        return dev.divide(g, one + dev.exp2(p * minus_log2e))

    return activation


def make_coefficients(plan: Plan, dev: Any) -> Any:
    """``coefficients(...)``: v of the packet's ``n`` neurons and tokens, lane by lane, zero where a token drops a neuron."""
    tokens, kind, gate, at = plan.batch, plan.kind, plan.first == "gate", plan.shared
    mask = plan.list_size - 1 if kind == "threshold" else -1  # the list of ``threshold`` is a circle
    width, activation = (1 if kind == "down" else 32 // plan.sparse_sums), make_activation(plan, dev)
    zero = np.float32(0.0)

    @dev.device_function
    def coefficients(shared, total, place, n, tid):
        number = (tid & 31) // width
        v = total
        if kind == "predictor" or kind == "given":
            v = activation(total) * dev.lane_xor(total, 16)
        if number >= n * tokens:
            return zero
        at_list, token = (place + number // tokens) & mask, number % tokens
        entry = dev.shared_load_i32(shared + at.work + at_list * 4)
        if entry == HOLE or (entry >> (24 + token)) & 1 == 0:
            return zero
        if kind == "threshold" or kind == "down":
            value = dev.shared_load_f32(shared + at.work_value + (at_list * tokens + token) * 4)
            if kind == "down":
                v = value
            elif gate:
                v = value * total
            else:
                v = activation(total) * value
        return v

    return coefficients


def make_copy_work(plan: Plan, dev: Any) -> Any:
    """``copy_work(...)``: copy the rows of the neurons of packet ``p`` of the work list, which ends at ``end``."""
    neurons, at, copy_neuron = plan.neurons, plan.shared, make_ring(plan, dev).copy_neuron

    @dev.device_function
    def copy_work(shared, packet, p, end, a, b, down, tid):
        for j in range(neurons):
            place, entry = p * neurons + j, HOLE
            if place < end:
                entry = dev.shared_load_i32(shared + at.work + place * 4)
            copy_neuron(packet, j, entry, entry != HOLE, a, b, down, tid)

    return copy_work


def make_use_work(plan: Plan, dev: Any) -> Any:
    """``use_work(...)``: y with ``v`` times the rows of W_down of a packet of the work list added, and the scratch parity."""
    neurons, matrices, down_at = plan.neurons, plan.matrices, (plan.matrices - 1) * plan.neurons * plan.slot_bytes
    at, scratch_bytes = plan.shared, plan.scratch_floats * 4
    layout = (plan.batch, plan.chunks, plan.slot_bytes, plan.chunk_bytes)
    dot = dev.make_rows_dot(plan.dtype, max(1, (matrices - 1) * neurons), *layout)
    add = dev.make_rows_add(plan.dtype, neurons, *layout)
    block_sum, coefficients = make_block_sum(plan, dev, plan.sparse_sums), make_coefficients(plan, dev)
    spread = dev.make_lanes_spread(neurons * plan.batch, 1 if matrices == 1 else 32 // plan.sparse_sums)
    nothing = np.float32(0.0)

    @dev.device_function
    def use_work(shared, packet, p, parity, y, tid):
        if dev.shared_load_i32(shared + at.work + p * neurons * 4) != HOLE:
            total = nothing
            if matrices > 1:
                partial = dot(packet + tid * 16, shared + at.x + tid * 16)
                total = block_sum(shared + at.scratch + parity * scratch_bytes, tid, partial)
                parity ^= 1
            v = spread(coefficients(shared, total, p * neurons, neurons, tid))
            y = add(packet + down_at + tid * 16, v, y)
        return y, parity

    return use_work


def make_sparse(plan: Plan, dev: Any) -> tuple[Any, Any]:
    """``sparse(...)``: stream the rows of the work list, its held places and ``taken`` more; returns the thread's y.

    ``start(...)``: first packets of a kernel that begins with its work list ready.
    """
    neurons, depth, held_places, at = plan.neurons, plan.depth, plan.held, plan.shared
    packet_bytes, use_work, copy_work = plan.packet_bytes, make_use_work(plan, dev), make_copy_work(plan, dev)
    zeros = dev.make_zeros(plan.batch * plan.chunks * plan.vector)
    wait, drain = dev.make_copy_wait(plan.depth - 1), dev.make_copy_wait(0)

    @dev.device_function
    def sparse(shared, taken, ring, parity, a, b, down, tid):
        y = zeros()
        for p in range(depth + (taken + neurons - 1) // neurons):
            packet = shared + at.ring + ring * packet_bytes
            wait()
            y, parity = use_work(shared, packet, p, parity, y, tid)
            copy_work(shared, packet, p + depth, held_places + taken, a, b, down, tid)
            dev.copy_commit()
            ring = ring + 1 if ring + 1 < depth else 0
        drain()  # the reduction uses the ring's memory
        return y

    @dev.device_function
    def start(shared, a, b, down, tid):
        for p in range(depth):
            copy_work(shared, shared + at.ring + p * packet_bytes, p, held_places, a, b, down, tid)
            dev.copy_commit()

    return sparse, start
