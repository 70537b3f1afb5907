"""Device code that evens out the predictor methods' work: blocks that found many neurons give some to those that found few.

A block's share of the active neurons is hypergeometric (10.9 +- 3.1 of 109 rows at sparsity .9), and all blocks wait for the
last. Each tells the others its count and its list in tagged words, starts with its own neurons, fetches the counts as
part of its stream of weights, and one trip round the ring later the entries it is dealt: hardly anything waits. The deal
depends on the counts alone, so equal inputs still give equal sums.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.sparse_rows import make_copy_work, make_use_work
from kernels_numba.gpu.mlp.work_list import HOLE


def make_prefix(dev: Any) -> Any:
    """``prefix(value, lane)``: sum over the lanes before this one, and over all lanes."""

    @dev.device_function
    def prefix(value, lane):
        total = value
        by = 1
        while by < 32:
            other = dev.lane_of(total, lane - by)
            if lane >= by:
                total += other
            by *= 2
        return total - value, dev.lane_of(total, 31)

    return prefix


def make_counts(plan: Plan, dev: Any) -> SimpleNamespace:
    """``fetch(...)``: ask for all blocks' counts; ``check(...)``: wait for those that were not there yet."""
    n_blocks, threads, words = plan.n_blocks, plan.threads, -(-plan.n_blocks // 2)
    at, area, copy = plan.shared, plan.workspace, dev.make_copy(plan.hint)

    @dev.device_function
    def fetch(shared, workspace, tid):
        for i in range(tid, words, threads):
            copy(shared + at.counts + i * 16, workspace + area.counts + i * 16, 16)

    @dev.device_function
    def check(shared, workspace, epoch, tid):
        for i in range(tid, words, threads):
            for c in range(2 * i, min(2 * i + 2, n_blocks)):
                place = shared + at.counts + c * 8
                if dev.shared_load_i32(place + 4) != epoch:
                    dev.shared_store_i32(place, dev.wait_tagged_i32(workspace + area.counts + c * 8, epoch))
        dev.syncthreads()

    return SimpleNamespace(fetch=fetch, check=check)


def make_shares(plan: Plan, dev: Any) -> Any:
    """``shares(...)``: neurons of block ``c`` above and below an even share, and how many of its own it keeps.

    What a block has started when it learns the counts it keeps in any case.
    """
    started, at = 2 * plan.held, plan.shared

    @dev.device_function
    def shares(shared, c, share, extra):
        n = dev.shared_load_i32(shared + at.counts + c * 8)
        quota = share + (1 if c < extra else 0)
        kept = min(n, max(quota, started))
        return n - kept, max(0, quota - kept), kept

    return shares


def make_bounds(plan: Plan, dev: Any) -> Any:
    """``bounds(...)``: even share, blocks with one more, and which of all the neurons to be dealt are this block's."""
    n_blocks, at, prefix, shares = plan.n_blocks, plan.shared, make_prefix(dev), make_shares(plan, dev)

    @dev.device_function
    def bounds(shared, block, lane):
        total, above, before = 0, 0, 0
        for c in range(lane, n_blocks, 32):
            total += dev.shared_load_i32(shared + at.counts + c * 8)
        total = prefix(total, lane)[1]
        share, extra = total // n_blocks, total % n_blocks
        for c in range(lane, n_blocks, 32):
            over, under, _ = shares(shared, c, share, extra)
            above += over
            before += under if c < block else 0
        above, before = prefix(above, lane)[1], prefix(before, lane)[1]
        return share, extra, before, min(before + shares(shared, block, share, extra)[1], above)

    return bounds


def make_deal(plan: Plan, dev: Any) -> Any:
    """``deal(...)``: ask for the entries dealt to the block; returns how many of its own it keeps and how many it is dealt.

    What blocks have above their share goes to those below, both in the order of the blocks.
    """
    n_blocks, threads, groups = plan.n_blocks, plan.threads, -(-plan.n_blocks // 32)
    rows, spare, at, area = plan.d_ff // plan.n_blocks, plan.d_ff % plan.n_blocks, plan.shared, plan.workspace
    copy, prefix, shares = dev.make_copy(plan.hint), make_prefix(dev), make_shares(plan, dev)
    check_counts, bounds = make_counts(plan, dev).check, make_bounds(plan, dev)

    @dev.device_function
    def deal(shared, workspace, epoch, found, block, tid):
        lane, passed = tid & 31, 0
        check_counts(shared, workspace, epoch, tid)
        share, extra, begin, end = bounds(shared, block, lane)
        kept = shares(shared, block, share, extra)[2]
        for i in range(kept + tid, found, threads):
            dev.shared_store_i32(shared + at.work + i * 4, HOLE)
        if begin < end:
            for g in range(groups):
                c, over, from_place = g * 32 + lane, 0, 0
                if c < n_blocks:
                    over, _, from_place = shares(shared, c, share, extra)
                    from_place += c * rows + min(c, spare)
                before, everyone = prefix(over, lane)
                before += passed
                if tid < 32:
                    for n in range(max(before, begin), min(before + over, end)):
                        dev.shared_store_i32(shared + at.source + (n - begin) * 4, from_place + n - before)
                passed += everyone
        dev.syncthreads()
        for j in range(tid, end - begin, threads):
            place = dev.shared_load_i32(shared + at.source + j * 4)
            copy(shared + at.received + j * 16, workspace + area.entries + place // 2 * 16, 16)
        return kept, max(0, end - begin)

    return deal


def make_collect(plan: Plan, dev: Any) -> Any:
    """``collect(...)``: the entries dealt to the block into its work list, from place ``begin`` on."""
    threads, at, area = plan.threads, plan.shared, plan.workspace

    @dev.device_function
    def collect(shared, workspace, epoch, begin, received, tid):
        for j in range(tid, received, threads):
            place = dev.shared_load_i32(shared + at.source + j * 4)
            word = shared + at.received + j * 16 + place % 2 * 8
            entry = dev.shared_load_i32(word)
            if dev.shared_load_i32(word + 4) != epoch:
                entry = dev.wait_tagged_i32(workspace + area.entries + place * 8, epoch)
            dev.shared_store_i32(shared + at.work + (begin + j) * 4, entry)
        dev.syncthreads()

    return collect


def make_balanced(plan: Plan, dev: Any) -> Any:
    """``balanced(...)``: stream the rows of the block's ``found`` neurons and of those it is dealt; the thread's y.

    Counts are fetched, neurons dealt and entries collected each a trip round the ring after the one before.
    """
    neurons, depth, packet_bytes, at = plan.neurons, plan.depth, plan.packet_bytes, plan.shared
    deal_at, collect_at, received_at = plan.depth, 2 * plan.depth, plan.received_at
    zeros = dev.make_zeros(plan.batch * plan.chunks * plan.vector)
    wait, drain, least = dev.make_copy_wait(plan.depth - 1), dev.make_copy_wait(0), (2 * plan.depth + 1) * plan.neurons
    use_work, copy_work = make_use_work(plan, dev), make_copy_work(plan, dev)
    fetch_counts, deal, collect = make_counts(plan, dev).fetch, make_deal(plan, dev), make_collect(plan, dev)

    @dev.device_function
    def balanced(shared, workspace, epoch, found, a, b, down, block, tid):
        y, end, received, ring, parity, p = zeros(), found, 0, 0, 0, 0
        for i in range(depth):
            copy_work(shared, shared + at.ring + i * packet_bytes, i, end, a, b, down, tid)
            dev.copy_commit()
        last = max(end, least)  # the entries dealt come with packet ``collect_at``
        while p * neurons < last:
            packet = shared + at.ring + ring * packet_bytes
            wait()
            y, parity = use_work(shared, packet, p, parity, y, tid)
            if p == 0:
                fetch_counts(shared, workspace, tid)
            elif p == deal_at:
                end, received = deal(shared, workspace, epoch, found, block, tid)
                last = max(end, least)
            elif p == collect_at and received > 0:
                end = max(end, received_at)
                collect(shared, workspace, epoch, end, received, tid)
                end += received
                last = end
            copy_work(shared, packet, p + depth, end, a, b, down, tid)
            dev.copy_commit()
            p += 1
            ring = ring + 1 if ring + 1 < depth else 0
        drain()  # the reduction uses the ring's memory
        return y

    return balanced
