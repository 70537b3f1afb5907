"""Clock stamps of a traced kernel: what every block does when (``Plan.trace``, read by ``Layer.phases``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels_numba.gpu.mlp.plan import Plan

STAMPS = ("start", "filled", "first packet", "chosen", "summed", "all summed", "end")
# Phases between stamps by kind; the first overlaps with the kernel in front if launches are dependent.
_END = (("active rows", "chosen", "summed"), ("wait", "summed", "all summed"), ("sum of y", "all summed", "end"))
TRACED: dict[str, tuple[tuple[str, str, str], ...]] = {
    "threshold": (
        ("fill", "start", "filled"),
        ("dense and active rows", "filled", "summed"),
        *_END[1:],
    ),
    "predictor": (
        ("fill", "start", "filled"),
        ("z = V x", "filled", "first packet"),
        ("logits", "first packet", "chosen"),
        *_END,
    ),
    "given": (("fill", "start", "chosen"), *_END),
    "down": (("fill", "start", "chosen"), *_END),
}


def make_stamp(plan: Plan, dev: Any) -> Any:
    """``stamp(workspace, block, k, tid)``: note the clock as stamp number k, in a traced kernel; else nothing."""
    traced, area, n = plan.trace, plan.workspace, len(STAMPS)

    @dev.device_function
    def stamp(workspace, block, k, tid):
        if traced and tid == 0:
            dev.store_clock(workspace + area.trace + (block * n + k) * 8)

    return stamp
