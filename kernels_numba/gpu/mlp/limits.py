"""What a plan must keep to, so that it can be compiled and run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels_numba.gpu.ptx.dtypes import BYTES

if TYPE_CHECKING:
    from kernels_numba.gpu.mlp.plan import Plan

_SHARED_LIMIT = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227}  # KiB a block may use


def check_plan(plan: Plan) -> None:
    """Raise ValueError if a plan cannot be compiled."""
    if plan.dtype not in BYTES:
        raise ValueError(f"dtype {plan.dtype}: the CUDA kernels take {', '.join(BYTES)}; cast the weights")
    for name, value in (("d_model", plan.d_model), ("d_ff", plan.d_ff)):
        if value <= 0 or value % 8:
            raise ValueError(f"{name}={value}: the CUDA kernels need a positive multiple of 8; pad the weights")
    if plan.d_ff >= 1 << 24:
        raise ValueError(f"d_ff={plan.d_ff}: the kernels pack a neuron into 24 bits; split the layer")
    if plan.activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation {plan.activation!r}: the CUDA kernels know silu and gelu_tanh")
    if plan.rank < (plan.kind == "predictor") or (plan.rank > 0 and plan.kind not in ("predictor", "threshold")):
        raise ValueError(f"rank={plan.rank} of kind {plan.kind}: of a predictor above 0, of a threshold at least 0")
    if plan.predicted and (len(plan.predicted) > 2 or sum(rank for _, rank in plan.predicted) != plan.rank):
        raise ValueError(f"predicted={plan.predicted}: one or two quantities, whose ranks add up to rank={plan.rank}")
    if plan.low_rank and plan.rank > plan.d_model:
        raise ValueError(f"rank={plan.rank} of low_rank: at most d_model={plan.d_model}")
    if plan.low_rank and (plan.scaled or plan.ahead < 1 or plan.behind < 1):
        raise ValueError(
            f"scaled={plan.scaled}, ahead={plan.ahead}, behind={plan.behind}: a low rank takes the place of factors, and its "
            "packets are at least one ahead and one behind"
        )
    if plan.scaled and plan.kind != "threshold":
        raise ValueError(f"scaled of kind {plan.kind}: only a threshold on a projection takes a factor a neuron")
    if plan.batch not in (1, 2, 4, 8):
        raise ValueError(f"batch={plan.batch}: a launch holds 1, 2, 4 or 8 tokens; pad with rows of zeros")
    if plan.capability < (8, 0):
        major, minor = plan.capability
        raise ValueError(f"compute capability {major}.{minor}: the kernels need 8.0 (cp.async); use the masked backend")
    for sums in (plan.dense_sums if plan.kind in ("threshold", "predictor") else 1, plan.sparse_sums):
        if sums > 32 or sums & (sums - 1):
            raise ValueError(f"{sums} sums a packet: rows and neurons times batch must be a power of 2 up to 32")
    if plan.kind == "threshold" and (plan.neurons > 14 or plan.depth > 15):
        raise ValueError(
            f"neurons={plan.neurons}, depth={plan.depth}: at most 14 and 15, packets are noted in 4 bits each"
        )
    if plan.threads > 1024:
        raise ValueError(f"rank={plan.rank}: a row of the predictor must fit in 1024 threads; use a lower rank")
    limit = shared_limit(plan.capability)
    if plan.shared.total > limit:
        raise ValueError(f"{plan.shared.total} bytes of shared memory: over the {limit} a block may have; lower depth")


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory one block may use."""
    known = [c for c in _SHARED_LIMIT if c <= capability]
    return _SHARED_LIMIT[max(known)] * 1024 if capability < (10, 0) and known else 227 * 1024
