"""Clock stamps of a traced kernel: what every block does when (``Plan.trace``, read by ``Layer.phases``)."""

from __future__ import annotations

from typing import Any

from kernels_numba.gpu.mlp.plan import STAMPS, Plan


def make_stamp(plan: Plan, dev: Any) -> Any:
    """``stamp(workspace, block, k, tid)``: note the clock as stamp number k, in a traced kernel; else nothing."""
    traced, area, n = plan.trace, plan.workspace, len(STAMPS)

    @dev.device_function
    def stamp(workspace, block, k, tid):
        if traced and tid == 0:
            dev.store_clock(workspace + area.trace + (block * n + k) * 8)

    return stamp
