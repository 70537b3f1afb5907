"""Barriers: of a block's threads that work on rows, and of all blocks; the epoch counts a layer's launches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kernels_numba.gpu.mlp.plan import Plan


def make_sync(plan: Plan, dev: Any) -> Any:
    """``sync()``: barrier of the threads that work on rows."""
    return dev.make_barrier(plan.threads) if plan.launch_threads > plan.threads else dev.syncthreads


def make_flags(plan: Plan, dev: Any) -> SimpleNamespace:
    """Barrier of all blocks without a common counter: one 64-bit word a block, the epoch in its upper half.

    ``epoch(workspace, block)``: number of this launch, one more than the block's last; nothing is ever cleared.
    ``raise_flag(words, block, epoch, tid)``: all the block wrote before is visible to whoever has seen the word.
    ``wait(words, epoch, tid)``: until every block's word has this epoch.
    """
    n_blocks, threads, area, sync = plan.n_blocks, plan.threads, plan.workspace, make_sync(plan, dev)
    spins = dev.SPIN_LIMIT

    @dev.device_function
    def epoch(workspace, block):
        return ((dev.flag_load(workspace + area.done + block * 8) >> 32) + 1) & 0x7FFFFFFF

    @dev.device_function
    def raise_flag(words, block, now, tid):
        sync()
        if tid == 0:
            dev.flag_store(words + block * 8, now << 32)

    @dev.device_function
    def wait(words, now, tid):
        for i in range(tid, n_blocks, threads):
            word, left = dev.flag_load(words + i * 8), spins
            while (word >> 32) != now and left != 0:
                word = dev.flag_load(words + i * 8)
                left -= 1
        sync()

    return SimpleNamespace(epoch=epoch, raise_flag=raise_flag, wait=wait)
