"""A block's work list in shared memory: entries of the active neurons whose rows it reads.

An entry is an int32: the neuron in the low 24 bits, bit 24 + t set if token t keeps it; -1 is a hole.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.ptx.dtypes import BYTES

NEURON = (1 << 24) - 1
HOLE = -1


def make_clear(plan: Plan, dev: Any) -> Any:
    """``clear(...)``: no entry in the work list, as far as it is read before it is filled."""
    threads, at = plan.threads, plan.shared
    places = plan.work_size if plan.kind == "predictor" else plan.held

    @dev.device_function
    def clear(shared, tid):
        for i in range(tid, places, threads):
            dev.shared_store_i32(shared + at.work + i * 4, HOLE)
        dev.syncthreads()

    return clear


def make_recall(plan: Plan, dev: Any) -> Any:
    """``recall(...)``: the block's list and its length when the logits were computed by another kernel."""
    threads, at, area = plan.threads, plan.shared, plan.workspace

    @dev.device_function
    def recall(shared, workspace, block, first, epoch, tid):
        found = dev.wait_tagged_i32(workspace + area.counts + block * 8, epoch)
        for i in range(tid, found, threads):
            entry = dev.wait_tagged_i32(workspace + area.entries + (first + i) * 8, epoch)
            dev.shared_store_i32(shared + at.work + i * 4, entry)
        dev.syncthreads()
        return found

    return recall


def make_take(plan: Plan, dev: Any) -> Any:
    """``take(...)``: the block's share of a list given by the caller; returns the entries beyond the held places."""
    n_blocks, threads, tokens, held_places, d_ff = plan.n_blocks, plan.threads, plan.batch, plan.held, plan.d_ff
    neurons, at, valued = plan.neurons, plan.shared, plan.kind == "down"
    load_value, size = dev.make_load_narrow(plan.value_dtype), BYTES[plan.value_dtype]
    everyone = ((1 << plan.batch) - 1) << 24

    @dev.device_function
    def take(shared, indices, values, count, stride, block, tid):
        total = min(max(dev.load_i32(count), 0), d_ff)
        base, extra = total // n_blocks, total % n_blocks
        begin, mine = block * base + min(block, extra), base + (1 if block < extra else 0)
        for i in range(tid, mine, threads):
            dev.shared_store_i32(shared + at.work + i * 4, dev.load_i32(indices + (begin + i) * 4) | everyone)
            if valued:
                for t in range(tokens):
                    value = load_value(values + (t * stride + begin + i) * size)
                    dev.shared_store_f32(shared + at.work_value + (i * tokens + t) * 4, value)
        if tid < neurons:  # the last packet may not be full
            dev.shared_store_i32(shared + at.work + (mine + tid) * 4, HOLE)
        dev.syncthreads()
        return max(0, mine - held_places)

    return take
