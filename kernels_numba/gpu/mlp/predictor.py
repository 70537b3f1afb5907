"""Device code of the predictor methods' first phase: each block finds the active neurons among its own rows, in order."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.ring import make_block_sum, make_flags, make_stamp, make_stream


def make_logits(plan: Plan, dev: Any) -> tuple[Any, Any, Any]:
    """``copy_logit_rows(...)`` fills a packet with rows of U; ``logits(...)`` adds up its dot products warp by warp.

    ``keep(...)``, when all packets have passed: the block's work list, and its length.
    """
    tokens, warps, pieces, groups = plan.batch, plan.warps, plan.rank_pieces, -(-plan.block_rows // 32)
    per_slot, n_slots, slot = plan.logit_rows, plan.logit_slots, plan.slot_bytes
    sums, row_bytes, row_warps = plan.logit_slots * plan.batch, plan.rank_padded * plan.element, plan.rank_pieces // 32
    width, per_packet = 32 // (1 << (sums - 1).bit_length()), plan.logit_rows * plan.logit_slots
    used = plan.logit_warps
    work_at, z_at, logits_at = plan.shared["work"], plan.shared["z"], plan.shared["logits"]
    index_ws, counts_ws = plan.workspace["index"], plan.workspace["counts"]
    dot = dev.make_rows_dot_f32(plan.dtype, n_slots, tokens, slot, plan.rank_padded * 4)
    lanes_sum, copy, vector = dev.make_lanes_sum(sums), dev.make_copy(plan.hint), plan.vector
    load_f, store_f, store_i, tell = (
        dev.shared_load_f32,
        dev.shared_store_f32,
        dev.shared_store_i32,
        dev.store_tagged_i32,
    )
    ballot, popcount, sync, zero = dev.ballot, dev.popcount, dev.syncthreads, np.float32(0.0)

    @dev.device_function
    def copy_logit_rows(packet, u, first, begin, end, tid):
        sub, piece = tid // pieces, tid % pieces
        for s in range(n_slots):
            i = begin + s * per_slot + sub
            wanted = sub < per_slot and i < end
            row = first + i if wanted else 0
            copy(packet + s * slot + tid * 16, u + row * row_bytes + piece * 16, 16 if wanted else 0)

    @dev.device_function
    def logits(shared, packet, number, tid):
        lane, warp = tid & 31, tid >> 5
        mine = lanes_sum(dot(packet + tid * 16, shared + z_at + (tid % pieces) * vector * 4))
        if lane % width == 0 and lane // width < sums and warp < used:
            store_f(shared + logits_at + ((number * sums + lane // width) * used + warp) * 4, mine)

    @dev.device_function
    def keep(shared, workspace, first, end, threshold, n_tokens, epoch, block, tid):
        lane, warp, found = tid & 31, tid >> 5, 0
        sync()
        for g in range(groups):  # every warp counts all rows, one of them writes
            i, keepers = g * 32 + lane, 0
            if i < end:
                slot_row = i // per_packet * n_slots + i % per_packet // per_slot
                for t in range(tokens):
                    at = shared + logits_at + ((slot_row * tokens + t) * used + i % per_slot * row_warps) * 4
                    logit = zero
                    for w in range(row_warps):
                        logit += load_f(at + w * 4)
                    if t < n_tokens and not (logit < threshold):
                        keepers |= 1 << t
            kept = ballot(keepers != 0)
            if warp == g % warps and keepers != 0:
                place, entry = found + popcount(kept & ((1 << lane) - 1)), (first + i) | (keepers << 24)
                store_i(shared + work_at + place * 4, entry)
                tell(workspace + index_ws + (first + place) * 8, entry, epoch)
            found += popcount(kept)
        if tid == 0:
            tell(workspace + counts_ws + block * 8, found, epoch)
        sync()
        return found

    return copy_logit_rows, logits, keep


def make_predictor_select(plan: Plan, dev: Any) -> Any:
    """``select(...)`` of the predictor methods: z = V x over the grid, then the block's rows of U; (found, epoch).

    The rows of U do not depend on z: they are on their way while the other blocks' parts of z are waited for.
    """
    rows, depth, packet_bytes, rank = plan.rows, plan.depth, plan.slots * plan.slot_bytes, plan.rank
    per_packet, threads, tokens, padded = plan.logit_rows * plan.logit_slots, plan.threads, plan.batch, plan.rank_padded
    n_blocks, projects, chooses = plan.n_blocks, "project" in plan.phases, "select" in plan.phases
    ring_at, x_at, z_at, scratch_at = (plan.shared[k] for k in ("ring", "x", "z", "scratch"))
    z_ws, scratch_bytes, width = plan.workspace["z"], plan.scratch_floats * 4, 32 // plan.dense_sums
    stream, stamp, overlap = make_stream(plan, dev), make_stamp(plan, dev), plan.overlap
    copy_rows, load_x, copy_x = stream.copy_rows, stream.load_x, stream.copy_x
    copy_logit_rows, logits, keep = make_logits(plan, dev)
    commit, wait, ready = dev.copy_commit, dev.make_copy_wait(plan.depth - 1), dev.grid_dependency_wait
    block_sum, read_epoch = make_block_sum(plan, dev, plan.dense_sums), make_flags(plan, dev).epoch
    dot = dev.make_rows_dot(plan.dtype, rows, plan.batch, plan.chunks, plan.slot_bytes, plan.chunk_bytes)
    tell, wait_for, store_f = dev.store_tagged_f32, dev.wait_tagged_f32, dev.shared_store_f32
    sync, zero = dev.syncthreads, np.float32(0.0)

    @dev.device_function
    def fill(packet, p, z_steps, steps, z_end, v, u, first, end, block, tid):
        if p < z_steps:
            copy_rows(packet, v, block, n_blocks, p * rows, z_end, tid)
        elif p < steps:
            copy_logit_rows(packet, u, first, (p - z_steps) * per_packet, end, tid)
        commit()

    @dev.device_function
    def receive_z(shared, workspace, epoch, tid):
        sync()
        for i in range(tid, tokens * padded, threads):
            value = zero
            if i % padded < rank:
                value = wait_for(workspace + z_ws + i * 8, epoch)
            store_f(shared + z_at + i * 4, value)
        sync()

    @dev.device_function
    def select(shared, workspace, x, v, u, first, end, threshold, n_tokens, block, tid):
        z_end = (rank - block + n_blocks - 1) // n_blocks if projects and block < rank else 0
        z_steps = (z_end + rows - 1) // rows
        steps = z_steps + ((end + per_packet - 1) // per_packet if chooses else 0)
        ring, parity = 0, 0
        if not overlap:
            copy_x(shared, x, n_tokens, tid)
        for p in range(depth):
            fill(shared + ring_at + p * packet_bytes, p, z_steps, steps, z_end, v, u, first, end, block, tid)
        if overlap:
            ready()
        epoch = read_epoch(workspace, block)
        if overlap:
            load_x(shared, x, n_tokens, tid)
        stamp(workspace, block, 1, tid)
        for g in range(z_steps):
            packet = shared + ring_at + ring * packet_bytes
            wait()
            partial = dot(packet + tid * 16, shared + x_at + tid * 16)
            total = block_sum(shared + scratch_at + parity * scratch_bytes, tid, partial)
            parity ^= 1
            number = (tid & 31) // width
            i = g * rows + number // tokens
            if tid < 32 and tid % width == 0 and i < z_end:
                tell(workspace + z_ws + ((number % tokens) * padded + block + i * n_blocks) * 8, total, epoch)
            fill(packet, g + depth, z_steps, steps, z_end, v, u, first, end, block, tid)
            ring = ring + 1 if ring + 1 < depth else 0
        if not chooses:
            return 0, epoch
        receive_z(shared, workspace, epoch, tid)
        stamp(workspace, block, 2, tid)
        for g in range(z_steps, steps):
            packet = shared + ring_at + ring * packet_bytes
            wait()
            logits(shared, packet, g - z_steps, tid)
            fill(packet, g + depth, z_steps, steps, z_end, v, u, first, end, block, tid)
            ring = ring + 1 if ring + 1 < depth else 0
        return keep(shared, workspace, first, end, threshold, n_tokens, epoch, block, tid), epoch

    return select
