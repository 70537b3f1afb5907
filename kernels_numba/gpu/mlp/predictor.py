"""Device code of the predictor methods' first phase: each block finds the active neurons among its own rows, in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.grid_barrier import make_flags
from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.reduce import make_block_sum
from kernels_numba.gpu.mlp.ring import make_ring, make_tokens
from kernels_numba.gpu.mlp.sparse_rows import make_activation
from kernels_numba.gpu.mlp.trace import make_stamp


def make_copy_logit_rows(plan: Plan, dev: Any) -> Any:
    """``copy_logit_rows(...)``: fill a packet with rows of U, several to a slot."""
    per_slot, n_slots, slot, pieces = plan.logit_rows, plan.logit_slots, plan.slot_bytes, plan.rank_pieces
    row_bytes, copy = plan.rank_padded * plan.element, dev.make_copy(plan.hint)

    @dev.device_function
    def copy_logit_rows(packet, u, first, begin, end, tid):
        sub, piece = tid // pieces, tid % pieces
        for s in range(n_slots):
            i = begin + s * per_slot + sub
            wanted = sub < per_slot and i < end
            row = first + i if wanted else 0
            copy(packet + s * slot + tid * 16, u + row * row_bytes + piece * 16, 16 if wanted else 0)

    return copy_logit_rows


def make_logits(plan: Plan, dev: Any) -> Any:
    """``logits(...)``: the warps' parts of the dot products of a packet of U with z, left in shared memory."""
    pieces, vector, used, at = plan.rank_pieces, plan.vector, plan.logit_warps, plan.shared
    sums = plan.logit_slots * plan.batch
    width, lanes_sum = 32 // (1 << (sums - 1).bit_length()), dev.make_lanes_sum(sums)
    dot = dev.make_rows_dot_f32(plan.dtype, plan.logit_slots, plan.batch, plan.slot_bytes, plan.rank_padded * 4)

    @dev.device_function
    def logits(shared, packet, number, tid):
        lane, warp = tid & 31, tid >> 5
        mine = lanes_sum(dot(packet + tid * 16, shared + at.z + (tid % pieces) * vector * 4))
        if lane % width == 0 and lane // width < sums and warp < used:
            dev.shared_store_f32(shared + at.logits + ((number * sums + lane // width) * used + warp) * 4, mine)

    return logits


def make_logit(plan: Plan, dev: Any) -> SimpleNamespace:
    """``logit(...)``: of row ``i`` from the warps' parts of its dot products; ``copy_residuals(...)``: what that takes.

    A gated predictor approximates one or two quantities, each by some warps of a row of U, and its logit is the root of the
    product of ``q^2 + residual``, what their squares are expected to be. The residuals of the block's rows are
    asked for before the weights: loaded when they are needed they would come 3 to 10 us late.
    """
    predicted, row_warps, zero = [name for name, _ in plan.predicted], plan.rank_pieces // 32, np.float32(0.0)
    first_warps, two, acts = plan.parts[0][1] // plan.vector // 32, len(predicted) == 2, predicted[:1] == ["act"]
    n, d_ff, rows, threads, at = len(predicted), plan.d_ff, plan.block_rows, plan.threads, plan.shared
    activation = make_activation(plan, dev)

    @dev.device_function
    def total(parts, begin, end):
        found = zero
        for w in range(begin, end):
            found += dev.shared_load_f32(parts + w * 4)
        return found

    @dev.device_function
    def expected(shared, guess, i):
        return guess * guess + dev.shared_load_f32(shared + at.residuals + i * 4)

    @dev.device_function
    def logit(shared, parts, i):
        found = total(parts, 0, first_warps)
        if n:
            square = expected(shared, activation(found) if acts else found, i)
            if two:
                square *= expected(shared, total(parts, first_warps, row_warps), rows + i)
            found = dev.sqrt(square)
        return found

    @dev.device_function
    def copy_residuals(shared, residuals, first, end, tid):
        if n:
            for i in range(tid, end, threads):
                for j in range(n):
                    dev.copy4(shared + at.residuals + (j * rows + i) * 4, residuals + (j * d_ff + first + i) * 4)

    return SimpleNamespace(logit=logit, copy_residuals=copy_residuals)


def make_keep(plan: Plan, dev: Any) -> Any:
    """``keep(...)``, when all packets of U have passed: the block's work list, told to the others, and its length."""
    tokens, warps, groups, at, area = plan.batch, plan.warps, -(-plan.block_rows // 32), plan.shared, plan.workspace
    per_slot, n_slots, per_packet = plan.logit_rows, plan.logit_slots, plan.logit_rows * plan.logit_slots
    used, row_warps, logit = plan.logit_warps, plan.rank_pieces // 32, make_logit(plan, dev).logit

    @dev.device_function
    def keep(shared, workspace, first, end, threshold, n_tokens, epoch, block, tid):
        lane, warp, found = tid & 31, tid >> 5, 0
        dev.syncthreads()
        for g in range(groups):  # every warp counts all rows, one of them writes
            i, keepers = g * 32 + lane, 0
            if i < end:
                slot_row = i // per_packet * n_slots + i % per_packet // per_slot
                for t in range(tokens):
                    parts = shared + at.logits + ((slot_row * tokens + t) * used + i % per_slot * row_warps) * 4
                    value = logit(shared, parts, i)
                    if t < n_tokens and not (value < threshold):
                        keepers |= 1 << t
            kept = dev.ballot(keepers != 0)
            if warp == g % warps and keepers != 0:
                place, entry = found + dev.popcount(kept & ((1 << lane) - 1)), (first + i) | (keepers << 24)
                dev.shared_store_i32(shared + at.work + place * 4, entry)
                dev.store_tagged_i32(workspace + area.entries + (first + place) * 8, entry, epoch)
            found += dev.popcount(kept)
        if tid == 0:
            dev.store_tagged_i32(workspace + area.counts + block * 8, found, epoch)
        dev.syncthreads()
        return found

    return keep


def make_fill_select(plan: Plan, dev: Any) -> Any:
    """``fill(...)``: copy packet ``p`` of the phase, of V up to ``z_steps`` and of U from there to ``steps``."""
    rows, n_blocks, per_packet = plan.rows, plan.n_blocks, plan.logit_rows * plan.logit_slots
    copy_rows, copy_logit_rows = make_ring(plan, dev).copy_rows, make_copy_logit_rows(plan, dev)

    @dev.device_function
    def fill(packet, p, z_steps, steps, z_end, v, u, first, end, block, tid):
        if p < z_steps:
            copy_rows(packet, v, block, n_blocks, p * rows, z_end, tid)
        elif p < steps:
            copy_logit_rows(packet, u, first, (p - z_steps) * per_packet, end, tid)
        dev.copy_commit()

    return fill


def make_project(plan: Plan, dev: Any) -> Any:
    """``project(...)``: entries of z from a packet of V, told to all blocks; returns the scratch parity."""
    rows, tokens, rank, padded, n_blocks = plan.rows, plan.batch, plan.rank, plan.rank_padded, plan.n_blocks
    at, area, scratch_bytes, width = plan.shared, plan.workspace, plan.scratch_floats * 4, 32 // plan.dense_sums
    split, begin = plan.parts[0]  # the second part of z begins where that of a row of U does
    dot = dev.make_rows_dot(plan.dtype, rows, plan.batch, plan.chunks, plan.slot_bytes, plan.chunk_bytes)
    block_sum = make_block_sum(plan, dev, plan.dense_sums)

    @dev.device_function
    def project(shared, workspace, packet, g, parity, z_end, epoch, block, tid):
        partial = dot(packet + tid * 16, shared + at.x + tid * 16)
        total = block_sum(shared + at.scratch + parity * scratch_bytes, tid, partial)
        parity ^= 1
        number = (tid & 31) // width
        i = g * rows + number // tokens
        if tid < 32 and tid % width == 0 and i < z_end:
            entry = block + i * n_blocks
            if split < rank and entry >= split:
                entry += begin - split
            dev.store_tagged_f32(workspace + area.z + ((number % tokens) * padded + entry) * 8, total, epoch)
        return parity

    return project


def make_receive_z(plan: Plan, dev: Any) -> Any:
    """``receive_z(...)``: z of all tokens from all blocks into shared memory, with a barrier on both sides."""
    threads, tokens, padded, rank = plan.threads, plan.batch, plan.rank_padded, plan.rank
    at, area, zero, (split, begin) = plan.shared, plan.workspace, np.float32(0.0), plan.parts[0]
    two = len(plan.parts) == 2

    @dev.device_function
    def receive_z(shared, workspace, epoch, tid):
        dev.syncthreads()
        for i in range(tid, tokens * padded, threads):
            value, column = zero, i % padded
            if column < split or (two and begin <= column < begin + rank - split):
                value = dev.wait_tagged_f32(workspace + area.z + i * 8, epoch)
            dev.shared_store_f32(shared + at.z + i * 4, value)
        dev.syncthreads()

    return receive_z


def make_predictor_select(plan: Plan, dev: Any) -> Any:
    """``select(...)`` of the predictor methods: z = V x over the grid, then the block's rows of U; (found, epoch).

    The rows of U do not depend on z: they are on their way while the other blocks' parts of z are waited for.
    """
    rows, depth, packet_bytes, rank, at = plan.rows, plan.depth, plan.packet_bytes, plan.rank, plan.shared
    projects, chooses, overlap = "project" in plan.phases, "select" in plan.phases, plan.overlap
    n_blocks, per_packet, wait = plan.n_blocks, plan.logit_rows * plan.logit_slots, dev.make_copy_wait(plan.depth - 1)
    fill, project, receive_z = make_fill_select(plan, dev), make_project(plan, dev), make_receive_z(plan, dev)
    logits, keep, stamp = make_logits(plan, dev), make_keep(plan, dev), make_stamp(plan, dev)
    copy_residuals = make_logit(plan, dev).copy_residuals
    tokens, read_epoch = make_tokens(plan, dev), make_flags(plan, dev).epoch
    load_x, copy_x = tokens.load_x, tokens.copy_x

    @dev.device_function
    def select(shared, workspace, x, v, u, residuals, first, end, threshold, n_tokens, block, tid):
        z_end = (rank - block + n_blocks - 1) // n_blocks if projects and block < rank else 0
        z_steps = (z_end + rows - 1) // rows
        steps = z_steps + ((end + per_packet - 1) // per_packet if chooses else 0)
        ring, parity = 0, 0
        if not overlap:
            copy_x(shared, x, n_tokens, tid)
        if chooses:
            copy_residuals(shared, residuals, first, end, tid)
        for p in range(depth):
            fill(shared + at.ring + p * packet_bytes, p, z_steps, steps, z_end, v, u, first, end, block, tid)
        if overlap:
            dev.grid_dependency_wait()
        epoch = read_epoch(workspace, block)
        if overlap:
            load_x(shared, x, n_tokens, tid)
        stamp(workspace, block, 1, tid)
        for g in range(z_steps):
            packet = shared + at.ring + ring * packet_bytes
            wait()
            parity = project(shared, workspace, packet, g, parity, z_end, epoch, block, tid)
            fill(packet, g + depth, z_steps, steps, z_end, v, u, first, end, block, tid)
            ring = ring + 1 if ring + 1 < depth else 0
        if not chooses:
            return 0, epoch
        receive_z(shared, workspace, epoch, tid)
        stamp(workspace, block, 2, tid)
        for g in range(z_steps, steps):
            packet = shared + at.ring + ring * packet_bytes
            wait()
            logits(shared, packet, g - z_steps, tid)
            fill(packet, g + depth, z_steps, steps, z_end, v, u, first, end, block, tid)
            ring = ring + 1 if ring + 1 < depth else 0
        return keep(shared, workspace, first, end, threshold, n_tokens, epoch, block, tid), epoch

    return select
