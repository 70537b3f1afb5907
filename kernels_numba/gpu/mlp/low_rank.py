"""Device code of md-countdown: factors of the neurons, ``sqrt(act(U V^T x)^2 + residual)``, made while the rows that choose stream.

All blocks compute z = V^T x together and tell it to each other. A warp that takes no part in the copies of weights makes the
factors of the block's dense packets from it, rows of U some packets ahead, and tells them by tagged words. A dense packet is
chosen from when its factors have been waited for, some packets after its dot products: neither z nor a row of U stalls the stream.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from kernels_numba.gpu.mlp.grid_barrier import make_flags
from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.predictor import make_project
from kernels_numba.gpu.mlp.ring import make_ring, make_tokens
from kernels_numba.gpu.mlp.sparse_rows import make_activation


def make_share_z(plan: Plan, dev: Any) -> SimpleNamespace:
    """``start(...)``: the block's first rows of V into the ring's last packet; ``finish(...)``: its entries of z, told to all.

    V goes before the dense rows, as x is awaited with it; that packet then takes dense rows as all do.
    """
    rows, rank, n_blocks, steps = plan.rows, plan.rank, plan.n_blocks, plan.z_steps
    place, copy_rows, project = (
        (plan.depth - 1) * plan.packet_bytes,
        make_ring(plan, dev).copy_rows,
        make_project(plan, dev),
    )
    at, wait, drain = plan.shared, dev.make_copy_wait(plan.depth - 1), dev.make_copy_wait(0)

    @dev.device_function
    def start(shared, v, block, tid):
        end = (rank - block + n_blocks - 1) // n_blocks if block < rank else 0
        copy_rows(shared + at.ring + place, v, block, n_blocks, 0, end, tid)
        dev.copy_commit()

    @dev.device_function
    def finish(shared, workspace, v, epoch, block, tid):
        end = (rank - block + n_blocks - 1) // n_blocks if block < rank else 0
        packet, parity = shared + at.ring + place, steps & 1  # the stream goes on with scratch 0
        wait()
        for g in range(steps):
            parity = project(shared, workspace, packet, g, parity, end, epoch, block, tid)
            if g + 1 < steps:
                copy_rows(packet, v, block, n_blocks, (g + 1) * rows, end, tid)
                dev.copy_commit()
                drain()

    return SimpleNamespace(start=start, finish=finish)


def make_project_alone(plan: Plan, dev: Any) -> Any:
    """``project(...)``: the block's entries of z by a kernel that does nothing else."""
    share_z, tokens, read_epoch = make_share_z(plan, dev), make_tokens(plan, dev), make_flags(plan, dev).epoch
    start, finish, copy_x, commit = share_z.start, share_z.finish, tokens.copy_x, dev.copy_commit
    others, overlap = plan.depth - 1, plan.overlap

    @dev.device_function
    def project(shared, workspace, x, v, n_tokens, block, tid):
        if overlap:
            dev.grid_dependency_wait()
        copy_x(shared, x, n_tokens, tid)
        start(shared, v, block, tid)
        for _ in range(others):  # in the place of dense rows
            commit()
        finish(shared, workspace, v, read_epoch(workspace, block), block, tid)

    return project


def make_clear_told(plan: Plan, dev: Any) -> Any:
    """``clear_told(...)``: no factor and no packet told yet; the barrier after it includes the warp of factors."""
    turns, sums, at, threads = plan.factor_turns, plan.dense_sums, plan.shared, plan.launch_threads

    @dev.device_function
    def clear_told(shared, tid):
        for i in range(tid, turns * sums, threads):
            dev.shared_tell(shared + at.told + i * 8, 0, 0)
        for i in range(tid, turns, threads):
            dev.shared_tell(shared + at.noted + i * 8, 0, 0)

    return clear_told


def make_choice(plan: Plan, dev: Any) -> SimpleNamespace:
    """What the threads that work on rows have to do with factors.

    ``note(...)``: tell the warp of factors which the block's i-th dense packet is. ``keep(...)``: the sums of a packet, until it
    is chosen from. ``due(...)``: whether the oldest packet kept is. ``receive(...)``: its factors, awaited before the barrier
    that ``total(...)``, ``first_row(...)`` and ``factor(...)`` come after.
    """
    lag, turns, sums, packets = plan.lag, plan.factor_turns, plan.dense_sums, plan.dense_packets
    at, clerk, width = plan.shared, plan.clerk, 32 // plan.dense_sums

    @dev.device_function
    def note(shared, i, packet):
        dev.shared_tell(shared + at.noted + i % turns * 8, packet, i + 1)

    @dev.device_function
    def keep(shared, used, total, begin, tid):
        if tid < 32 and tid % width == 0:
            dev.shared_store_f32(shared + at.sums + (used % turns * sums + tid // width) * 4, total)
            if tid == 0:
                dev.shared_store_i32(shared + at.rows + used % turns * 4, begin)

    @dev.device_function
    def due(chosen, used, issued, following):
        return chosen < used and (issued - chosen >= lag or following >= packets)

    @dev.device_function
    def receive(shared, chosen, tid):
        if clerk <= tid < clerk + sums:
            i = tid - clerk
            value = dev.shared_wait_f32(shared + at.told + (chosen % turns * sums + i) * 8, chosen + 1)
            dev.shared_store_f32(shared + at.factors + ((chosen & 1) * sums + i) * 4, value)

    @dev.device_function
    def total(shared, chosen, tid):
        return dev.shared_load_f32(shared + at.sums + (chosen % turns * sums + (tid & 31) // width) * 4)

    @dev.device_function
    def first_row(shared, chosen):
        return dev.shared_load_i32(shared + at.rows + chosen % turns * 4)

    @dev.device_function
    def factor(shared, chosen, number):
        return dev.shared_load_f32(shared + at.factors + ((chosen & 1) * sums + number) * 4)

    return SimpleNamespace(
        note=note, keep=keep, due=due, receive=receive, total=total, first_row=first_row, factor=factor
    )


def make_fetch(plan: Plan, dev: Any) -> Any:
    """``fetch(...)``: the lane's pieces of U and its row's residual for the i-th dense packet; index of the first that is none."""
    rows, depth, d_ff, n_blocks, packets = plan.rows, plan.depth, plan.d_ff, plan.n_blocks, plan.dense_packets
    width, pieces, rounds, row_bytes = 32 // plan.rows, plan.rank_pieces, plan.rank_rounds, plan.rank_pieces * 16
    at, ahead, turns, copy = plan.shared, plan.ahead, plan.factor_turns, dev.make_copy(plan.hint)

    @dev.device_function
    def fetch(shared, u, residual, i, last, block, lane):
        if i < last:
            packet = block + i * n_blocks
            if i >= depth:
                if lane == 0:
                    packet = dev.shared_wait(shared + at.noted + i % turns * 8, i + 1)
                packet = dev.lane_of(packet, 0)
            row, part, place = packet * rows + lane // width, lane % width, i % ahead
            if packet >= packets:
                last = i
            else:
                for c in range(rounds):
                    piece = part + c * width
                    size = 16 if row < d_ff and piece < pieces else 0
                    source = u + row * row_bytes + piece * 16 if size else u
                    copy(shared + at.low + ((place * rounds + c) * 32 + lane) * 16, source, size)
                if row < d_ff:
                    dev.copy4(shared + at.missed + (place * 32 + lane) * 4, residual + row * 4)
        dev.copy_commit()
        return last

    return fetch


def make_reach(plan: Plan, dev: Any) -> Any:
    """``reach(...)``: rows of U of the packet that would be the block's i-th if all were dealt out, into L2.

    All blocks together reach all rows of U, some packets before they are used. Copied from memory, behind the ring's copies,
    a packet's rows take 9 us (H200), which is the time of 6 packets; from L2 less than one.
    """
    rows, d_ff, n_blocks, row_bytes = plan.rows, plan.d_ff, plan.n_blocks, plan.rank_pieces * 16
    lines = -(-rows * row_bytes // 128)

    @dev.device_function
    def reach(u, residual, i, block, lane):
        row = (block + i * n_blocks) * rows
        n_bytes = min(rows, d_ff - row) * row_bytes
        for line in range(lane, lines, 32):
            if line * 128 < n_bytes:
                dev.prefetch(u + row * row_bytes + line * 128)
        if lane == 31 and n_bytes > 0:
            dev.prefetch(residual + row * 4)

    return reach


def make_factor(plan: Plan, dev: Any) -> Any:
    """``factor(...)``: the factors of the i-th dense packet, told to the threads that choose."""
    tokens, turns, sums = plan.batch, plan.factor_turns, plan.dense_sums
    width, rounds, ahead, padded, vector = 32 // plan.rows, plan.rank_rounds, plan.ahead, plan.rank_padded, plan.vector
    at, fold, gate = plan.shared, dev.make_lanes_fold(32 // plan.rows), plan.first == "gate"
    dot, activation = dev.make_rows_dot_f32(plan.dtype, 1, 1, 0, 0), make_activation(plan, dev)
    zero = np.float32(0.0)

    @dev.device_function
    def factor(shared, i, lane):
        row, part, place = lane // width, lane % width, i % ahead
        missed = dev.shared_load_f32(shared + at.missed + (place * 32 + lane) * 4)
        for t in range(tokens):
            guess = zero
            for c in range(rounds):
                z = shared + at.z + (t * padded + (part + c * width) * vector) * 4
                guess += dot(shared + at.low + ((place * rounds + c) * 32 + lane) * 16, z)[0]
            guess = fold(guess)
            if not gate:  # what is approximated is the gate
                guess = activation(guess)
            if part == 0:
                told = shared + at.told + (i % turns * sums + row * tokens + t) * 8
                dev.shared_tell_f32(told, math.sqrt(guess * guess + missed), i + 1)

    return factor


def make_receive_words(plan: Plan, dev: Any) -> Any:
    """``receive(...)``: z of all tokens from all blocks; only the warp of factors reads it."""
    rank, padded, tokens, at, area = plan.rank, plan.rank_padded, plan.batch, plan.shared, plan.workspace
    at_once = 4
    wait = dev.make_wait_tagged(at_once)

    @dev.device_function
    def receive(shared, workspace, epoch, lane):
        for i in range(lane * at_once, tokens * padded, 32 * at_once):
            first = i % padded  # rows of z are whole fours, so all four are of one token
            places = workspace + area.z + i * 8
            words = wait(places, rank - first, epoch)
            for j in range(at_once):
                dev.shared_store_f32(shared + at.z + (i + j) * 4, words[j])
        dev.sync_warp()

    return receive


def make_factor_warp(plan: Plan, dev: Any) -> Any:
    """``serve(...)``: all that the warp of factors does."""
    ahead, packets, overlap, wait = plan.ahead, plan.dense_packets, plan.overlap, dev.make_copy_wait(plan.ahead - 1)
    fetch, factor, receive = make_fetch(plan, dev), make_factor(plan, dev), make_receive_words(plan, dev)
    reach, reaches = make_reach(plan, dev), plan.reach
    read_epoch, drain, known = make_flags(plan, dev).epoch, dev.make_copy_wait(0), min(plan.ahead, plan.depth)

    @dev.device_function
    def serve(shared, workspace, u, residual, block, lane):
        last, i = packets, 0
        for p in range(known):
            last = fetch(shared, u, residual, p, last, block, lane)
        for p in range(known, known + reaches):
            reach(u, residual, p, block, lane)
        if overlap:  # before any packet is asked for: the wait for one would spin as long as the kernel in front runs
            dev.grid_dependency_wait()
        epoch = read_epoch(workspace, block)
        for p in range(known, ahead):
            last = fetch(shared, u, residual, p, last, block, lane)
        if last > 0:
            receive(shared, workspace, epoch, lane)
        while i < last:
            if reaches > 0:
                reach(u, residual, known + reaches + i, block, lane)
            wait()
            factor(shared, i, lane)
            last = fetch(shared, u, residual, i + ahead, last, block, lane)
            i += 1
        drain()

    return serve
