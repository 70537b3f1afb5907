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
from kernels_numba.gpu.mlp.ring import HOLE
from kernels_numba.gpu.mlp.sparse_rows import make_packets


def make_prefix(dev: Any) -> Any:
    """``prefix(value, lane)``: sum over the lanes before this one, and over all lanes."""
    lane_of = dev.lane_of

    @dev.device_function
    def prefix(value, lane):
        total = value
        by = 1
        while by < 32:
            other = lane_of(total, lane - by)
            if lane >= by:
                total += other
            by *= 2
        return total - value, lane_of(total, 31)

    return prefix


def make_shares(plan: Plan, dev: Any) -> Any:
    """``shares(...)``: neurons of block ``c`` above and below an even share, and how many of its own it keeps.

    What a block has started when it learns the counts it keeps in any case.
    """
    started, counts_at, load = 2 * plan.held, plan.shared["counts"], dev.shared_load_i32

    @dev.device_function
    def shares(shared, c, share, extra):
        n = load(shared + counts_at + c * 8)
        quota = share + (1 if c < extra else 0)
        kept = min(n, max(quota, started))
        return n - kept, max(0, quota - kept), kept

    return shares


def make_deal(plan: Plan, dev: Any) -> SimpleNamespace:
    """``fetch_counts(...)``, then ``deal(...)``, then ``collect(...)``, each a trip round the ring after the one before.

    ``deal`` returns how many of its own neurons the block keeps and how many it is dealt: what blocks have above their
    share goes to those below, both in the order of the blocks.
    """
    n_blocks, threads, words, groups = plan.n_blocks, plan.threads, -(-plan.n_blocks // 2), -(-plan.n_blocks // 32)
    rows, spare, work_at = plan.d_ff // plan.n_blocks, plan.d_ff % plan.n_blocks, plan.shared["work"]
    counts_at, source_at, received_at = (plan.shared[k] for k in ("counts", "source", "received"))
    counts_ws, index_ws = plan.workspace["counts"], plan.workspace["index"]
    load, store, wait_for = dev.shared_load_i32, dev.shared_store_i32, dev.wait_tagged_i32
    copy, sync, prefix, shares = dev.make_copy(plan.hint), dev.syncthreads, make_prefix(dev), make_shares(plan, dev)

    @dev.device_function
    def fetch_counts(shared, workspace, tid):
        for i in range(tid, words, threads):
            copy(shared + counts_at + i * 16, workspace + counts_ws + i * 16, 16)

    @dev.device_function
    def check_counts(shared, workspace, epoch, tid):
        """What had not been told when it was fetched."""
        for i in range(tid, words, threads):
            for c in range(2 * i, min(2 * i + 2, n_blocks)):
                place = shared + counts_at + c * 8
                if load(place + 4) != epoch:
                    store(place, wait_for(workspace + counts_ws + c * 8, epoch))
        sync()

    @dev.device_function
    def bounds(shared, block, lane):
        """Even share, blocks with one more, and which of all the neurons to be dealt are this block's."""
        total, above, before = 0, 0, 0
        for c in range(lane, n_blocks, 32):
            total += load(shared + counts_at + c * 8)
        total = prefix(total, lane)[1]
        share, extra = total // n_blocks, total % n_blocks
        for c in range(lane, n_blocks, 32):
            over, under, _ = shares(shared, c, share, extra)
            above += over
            before += under if c < block else 0
        above, before = prefix(above, lane)[1], prefix(before, lane)[1]
        return share, extra, before, min(before + shares(shared, block, share, extra)[1], above)

    @dev.device_function
    def deal(shared, workspace, epoch, found, block, tid):
        lane, passed = tid & 31, 0
        check_counts(shared, workspace, epoch, tid)
        share, extra, begin, end = bounds(shared, block, lane)
        kept = shares(shared, block, share, extra)[2]
        for i in range(kept + tid, found, threads):
            store(shared + work_at + i * 4, HOLE)
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
                        store(shared + source_at + (n - begin) * 4, from_place + n - before)
                passed += everyone
        sync()
        for j in range(tid, end - begin, threads):
            place = load(shared + source_at + j * 4)
            copy(shared + received_at + j * 16, workspace + index_ws + place // 2 * 16, 16)
        return kept, max(0, end - begin)

    @dev.device_function
    def collect(shared, workspace, epoch, at, received, tid):
        for j in range(tid, received, threads):
            place = load(shared + source_at + j * 4)
            word = shared + received_at + j * 16 + place % 2 * 8
            entry = load(word)
            if load(word + 4) != epoch:
                entry = wait_for(workspace + index_ws + place * 8, epoch)
            store(shared + work_at + (at + j) * 4, entry)
        sync()

    return SimpleNamespace(fetch_counts=fetch_counts, deal=deal, collect=collect)


def make_dealt(plan: Plan, dev: Any) -> Any:
    """``dealt(...)``: stream the rows of the block's ``found`` neurons and of those it is dealt; returns the thread's y."""
    neurons, depth, ring_at, received_at = plan.neurons, plan.depth, plan.shared["ring"], plan.received_at
    packet_bytes, (use, copy_work) = plan.slots * plan.slot_bytes, make_packets(plan, dev)
    zeros, deal_at, collect_at = dev.make_zeros(plan.batch * plan.chunks * plan.vector), plan.depth, 2 * plan.depth
    commit, wait, drain = dev.copy_commit, dev.make_copy_wait(plan.depth - 1), dev.make_copy_wait(0)
    dealer, least = make_deal(plan, dev), (2 * plan.depth + 1) * plan.neurons
    fetch_counts, deal, collect = dealer.fetch_counts, dealer.deal, dealer.collect

    @dev.device_function
    def dealt(shared, workspace, epoch, found, a, b, down, block, tid):
        y, end, received, ring, parity, p = zeros(), found, 0, 0, 0, 0
        for i in range(depth):
            copy_work(shared, shared + ring_at + i * packet_bytes, i, end, a, b, down, tid)
            commit()
        last = max(end, least)  # the entries dealt come with packet ``collect_at``
        while p * neurons < last:
            packet = shared + ring_at + ring * packet_bytes
            wait()
            y, parity = use(shared, packet, p, parity, y, tid)
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
            commit()
            p += 1
            ring = ring + 1 if ring + 1 < depth else 0
        drain()  # the reduction uses the ring's memory
        return y

    return dealt
