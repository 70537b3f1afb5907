"""Sums over the threads of a block, and over the blocks: from their shares of y to the output."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.grid_barrier import make_sync
from kernels_numba.gpu.mlp.plan import Plan


def make_block_sum(plan: Plan, dev: Any, sums: int) -> Any:
    """``block_sum(scratch, tid, values)``: sums over the block of ``sums`` values; lane l gets number l // (32 / sums).

    One barrier inside; consecutive calls must use different scratch areas.
    """
    width, warps, rounds = 32 // sums, plan.warps, -(-plan.warps // (32 // sums))
    lanes_sum, fold = dev.make_lanes_sum(sums), dev.make_lanes_fold(32 // sums)
    sync = make_sync(plan, dev)

    @dev.device_function
    def block_sum(scratch, tid, values):
        lane, warp = tid & 31, tid >> 5
        number, part = lane // width, lane % width
        mine = lanes_sum(values)
        if part == 0:
            dev.shared_store_f32(scratch + (((warp // width) * sums + number) * width + warp % width) * 4, mine)
        sync()
        total = np.float32(0.0)
        for i in range(rounds):
            if i * width + part < warps:
                total += dev.shared_load_f32(scratch + ((i * sums + number) * width + part) * 4)
        return fold(total)

    return block_sum


def make_store_partial(plan: Plan, dev: Any) -> Any:
    """``store_partial(...)``: write the block's share of y, fp32, to the workspace."""
    threads, pieces, chunks, vector = plan.threads, plan.pieces, plan.chunks, plan.vector
    area, block_bytes = plan.workspace, plan.batch * plan.d_model * 4
    store = dev.make_store_columns(
        plan.dtype, plan.batch, plan.chunks, plan.d_model * 4, plan.threads * plan.vector * 4
    )

    @dev.device_function
    def store_partial(workspace, block, y, tid):
        mine = min(chunks, (pieces - tid + threads - 1) // threads) if tid < pieces else 0
        store(workspace + area.partial + block * block_bytes + tid * vector * 4, y, mine)

    return store_partial


def make_reduce(plan: Plan, dev: Any) -> Any:
    """``reduce(...)``: sum all blocks' shares of this block's columns in a fixed order, add the residual, store y."""
    n_blocks, groups, mine, lanes = plan.n_blocks, plan.column_groups, plan.block_groups, plan.column_lanes
    warps, threads, d_model, size = plan.warps, plan.threads, plan.d_model, plan.element
    rows_at_once, row_bytes = plan.warps * (32 // plan.column_lanes), plan.batch * plan.d_model * 4
    total_of = dev.make_sum_strided(-(-plan.n_blocks // rows_at_once), rows_at_once * row_bytes)
    load_residual, store_y, zero = dev.make_load_narrow(plan.dtype), dev.make_store_narrow(plan.dtype), np.float32(0.0)
    at, area, sync = plan.shared, plan.workspace, make_sync(plan, dev)

    @dev.device_function
    def reduce(shared, workspace, residual, y, n_tokens, block, tid):
        lane, warp, columns = tid & 31, tid >> 5, shared + at.ring
        group, row = lane % lanes, warp * (32 // lanes) + lane // lanes
        for first in range(block * mine, groups, n_blocks * mine):
            count = 0
            if group < mine and first + group < groups and row < n_blocks:
                count = (n_blocks - row + rows_at_once - 1) // rows_at_once
            address = workspace + area.partial
            if count > 0:
                address += row * row_bytes + (first + group) * 16
            s0, s1, s2, s3 = total_of(address, count)
            mask = lanes
            while mask < 32:
                s0 += dev.lane_xor(s0, mask)
                s1 += dev.lane_xor(s1, mask)
                s2 += dev.lane_xor(s2, mask)
                s3 += dev.lane_xor(s3, mask)
                mask *= 2
            if lane < lanes:
                place = columns + (warp * lanes + lane) * 16
                dev.shared_store_f32(place, s0)
                dev.shared_store_f32(place + 4, s1)
                dev.shared_store_f32(place + 8, s2)
                dev.shared_store_f32(place + 12, s3)
            sync()
            for i in range(tid, mine * 4, threads):
                column = first * 4 + i
                if column < n_tokens * d_model:
                    total = zero
                    for w in range(warps):
                        total += dev.shared_load_f32(columns + (w * lanes * 4 + i) * 4)
                    if residual != 0:
                        total += load_residual(residual + column * size)
                    store_y(y + column * size, total)
            sync()

    return reduce
