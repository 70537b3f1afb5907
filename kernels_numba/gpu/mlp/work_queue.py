"""Device code that shares out the dense packets of CATS and M-COUNTDOWN: dealt beforehand, or the last half claimed.

An SM gets up to 6 % more bandwidth than another, and a block that finds more neurons has more to read: a block that is ahead
claims more. A claim is an addition to a global counter and takes a trip to L2, 3 to 10 us behind a ring of copies, so
a warp that takes no part in the copies claims ahead. A launch counts in one of two counters and clears the other.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kernels_numba.gpu.mlp.grid_barrier import make_flags
from kernels_numba.gpu.mlp.plan import CLAIMS, Plan


def make_clear_slots(plan: Plan, dev: Any) -> Any:
    """``clear_slots(...)``: no claim yet; the barrier after it includes the claiming warp."""
    at = plan.shared

    @dev.device_function
    def clear_slots(shared, tid):
        if tid <= CLAIMS:
            dev.shared_tell(shared + at.claims + tid * 8, 0, 0)

    return clear_slots


def make_clear_counter(plan: Plan, dev: Any) -> Any:
    """``clear_counter(...)``: the counter of the next launch, which begins to claim after this one has ended."""
    claims, area = plan.claims, plan.workspace

    @dev.device_function
    def clear_counter(workspace, epoch, block, tid):
        if claims and block == 0 and tid == 0:
            dev.store_i32(workspace + area.claims + ((epoch + 1) & 1) * 128, 0)

    return clear_counter


def make_packet_numbers(plan: Plan, dev: Any) -> SimpleNamespace:
    """``number(...)``: which dense packet the block's i-th is, behind a barrier after one thread's ``note(...)``.

    Packets are asked for in order, one at a time.
    """
    n_blocks, static, claims, at = plan.n_blocks, plan.static_packets, plan.claims, plan.shared
    asked_at = plan.shared.claims + CLAIMS * 8

    @dev.device_function
    def note(shared, i, block):
        if claims:
            packet, k = block + i * n_blocks, i - static
            if k >= 0:
                dev.shared_tell_i32(shared + asked_at, k + 1)
                packet = dev.shared_wait(shared + at.claims + k % CLAIMS * 8, k + 1)
            dev.shared_store_i32(shared + at.next + (i & 1) * 4, packet)

    @dev.device_function
    def number(shared, i, block):
        return dev.shared_load_i32(shared + at.next + (i & 1) * 4) if claims else block + i * n_blocks

    return SimpleNamespace(note=note, number=number)


def make_claim(plan: Plan, dev: Any) -> Any:
    """``claim(shared, workspace, block)``: what the claiming warp does."""
    packets, base, at, area = plan.dense_packets, plan.static_packets * plan.n_blocks, plan.shared, plan.workspace
    asked_at, read_epoch, overlap = plan.shared.claims + CLAIMS * 8, make_flags(plan, dev).epoch, plan.overlap

    @dev.device_function
    def claim(shared, workspace, block):
        if overlap:
            dev.grid_dependency_wait()
        counter, k = workspace + area.claims + (read_epoch(workspace, block) & 1) * 128, 0
        first, second, third = dev.atomic_add(counter, 1), dev.atomic_add(counter, 1), dev.atomic_add(counter, 1)
        while True:  # by turns, so that no claim waits for the one before; the first beyond the last packet ends it
            dev.shared_tell(shared + at.claims + k % CLAIMS * 8, base + first, k + 1)
            if base + first >= packets:
                break
            dev.shared_wait_above(shared + asked_at, k)
            first = dev.atomic_add(counter, 1)
            dev.shared_tell(shared + at.claims + (k + 1) % CLAIMS * 8, base + second, k + 2)
            if base + second >= packets:
                break
            dev.shared_wait_above(shared + asked_at, k + 1)
            second = dev.atomic_add(counter, 1)
            dev.shared_tell(shared + at.claims + (k + 2) % CLAIMS * 8, base + third, k + 3)
            if base + third >= packets:
                break
            dev.shared_wait_above(shared + asked_at, k + 2)
            third = dev.atomic_add(counter, 1)
            k += 3

    return claim
