"""Device code that shares out the dense packets of CATS and M-COUNTDOWN: dealt beforehand, or the last half claimed.

An SM gets up to 6 % more bandwidth than another, and a block that finds more neurons has more to read: whoever is ahead
claims more. A claim is an addition to a global counter and takes a trip to L2, 3 to 10 us behind a ring of copies, so
a warp that takes no part in the copies claims ahead. A launch counts in one of two counters and clears the other.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kernels_numba.gpu.mlp.plan import CLAIMS, Plan
from kernels_numba.gpu.mlp.ring import make_flags


def make_claims(plan: Plan, dev: Any) -> SimpleNamespace:
    """``number(...)``: which dense packet the block's i-th is, behind a barrier after one thread's ``note(...)``.

    Packets are asked for in order, one at a time. ``claim(shared, workspace, block)`` is what the claiming warp does;
    ``clear_slots``, ``clear_counter``: see there.
    """
    n_blocks, packets, static, claims = plan.n_blocks, plan.dense_packets, plan.static_packets, plan.claims
    base, slots_at, counter_ws = plan.static_packets * plan.n_blocks, plan.shared["claims"], plan.workspace["claims"]
    asked_at, store_global = plan.shared["claims"] + CLAIMS * 8, dev.store_i32
    add, wait, wait_above = dev.atomic_add, dev.shared_wait, dev.shared_wait_above
    tell, ask, load, store = dev.shared_tell, dev.shared_tell_i32, dev.shared_load_i32, dev.shared_store_i32
    next_at = plan.shared["next"]
    read_epoch, ready, overlap = make_flags(plan, dev).epoch, dev.grid_dependency_wait, plan.overlap

    @dev.device_function
    def clear_slots(shared, tid):
        """No claim yet; the barrier after it includes the claiming warp."""
        if tid <= CLAIMS:
            tell(shared + slots_at + tid * 8, 0, 0)

    @dev.device_function
    def clear_counter(workspace, epoch, block, tid):
        """The counter of the next launch, which begins to claim after this one has ended."""
        if claims and block == 0 and tid == 0:
            store_global(workspace + counter_ws + ((epoch + 1) & 1) * 128, 0)

    @dev.device_function
    def note(shared, i, block):
        if claims:
            packet, k = block + i * n_blocks, i - static
            if k >= 0:
                ask(shared + asked_at, k + 1)
                packet = wait(shared + slots_at + k % CLAIMS * 8, k + 1)
            store(shared + next_at + (i & 1) * 4, packet)

    @dev.device_function
    def number(shared, i, block):
        return load(shared + next_at + (i & 1) * 4) if claims else block + i * n_blocks

    @dev.device_function
    def claim(shared, workspace, block):
        if overlap:
            ready()
        counter, k = workspace + counter_ws + (read_epoch(workspace, block) & 1) * 128, 0
        first, second, third = add(counter, 1), add(counter, 1), add(counter, 1)
        while True:  # by turns, so that no claim waits for the one before; the first beyond the last packet ends it
            tell(shared + slots_at + k % CLAIMS * 8, base + first, k + 1)
            if base + first >= packets:
                break
            wait_above(shared + asked_at, k)
            first = add(counter, 1)
            tell(shared + slots_at + (k + 1) % CLAIMS * 8, base + second, k + 2)
            if base + second >= packets:
                break
            wait_above(shared + asked_at, k + 1)
            second = add(counter, 1)
            tell(shared + slots_at + (k + 2) % CLAIMS * 8, base + third, k + 3)
            if base + third >= packets:
                break
            wait_above(shared + asked_at, k + 2)
            third = add(counter, 1)
            k += 3

    return SimpleNamespace(clear_slots=clear_slots, clear_counter=clear_counter, note=note, number=number, claim=claim)
