"""Which plan a layer runs: packet sizes and ring depth by kind, shape and batch, from the measurements in NOTES.md."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, Literal

from kernels_numba.gpu.mlp.plan import Kind, Plan, Quantity, shared_limit

_REGISTERS = 65536  # of an SM
_BLOCK_RESERVED = 1024  # shared memory the system keeps for every block


def launch_tokens(plan: Plan) -> int:
    """Most tokens of one launch: each thread holds ``batch`` times its columns, as sums, in registers.

    64 sums need 128 registers a thread; a larger batch runs as several launches.
    """
    return 8 if _REGISTERS // plan.threads >= 128 and plan.chunks * plan.vector <= 8 else 4


def _packets(plan: Plan) -> Plan:
    """Rows and neurons of a packet: at most 32 sums, and few enough that several packets fit."""
    # 4 rows would spill: in 48 registers a thread, and where y of 8 tokens takes 64 while rows are multiplied
    few = plan.threads > 512 if plan.kind == "predictor" else plan.kind == "threshold" and plan.batch == 8
    rows = min(2 if few else 4, 32 // plan.batch)
    most = 32 // (max(1, plan.matrices - 1) * plan.batch)
    neurons = min(most, {"threshold": 2, "predictor": 1, "given": 1, "down": 4}[plan.kind])
    return replace(plan, rows=rows, neurons=max(1, neurons))


@cache
def tuned_plan(
    kind: Kind,
    d_model: int,
    d_ff: int,
    dtype: str,
    activation: str,
    *,
    first: Literal["gate", "up"] = "up",
    rank: int = 0,
    batch: int = 1,
    n_blocks: int,
    capability: tuple[int, int],
    value_dtype: str = "float32",
    deterministic: bool = False,
    scaled: bool = False,
    predicted: tuple[tuple[Quantity, int], ...] = (),
) -> Plan:
    """Plan of a layer on a device with ``n_blocks`` SMs.

    Half of an SM's shared memory and registers if that leaves two packets in flight (the next kernel can then start
    beside this one, compute capability 9), else all of it. More than about 100 KB in flight an SM gains nothing: the
    memory is saturated, and what the blocks tell each other queues behind the copies.

    Raises
    ------
    ValueError
        The shape cannot be compiled (see `Plan.check`) or not even one packet fits.
    """
    plan = Plan(
        kind, d_model, d_ff, dtype=dtype, activation=activation, first=first, rank=rank, batch=batch,
        n_blocks=n_blocks, capability=capability, value_dtype=value_dtype, deterministic=deterministic,
        scaled=scaled, predicted=predicted,
    )  # fmt: skip
    if d_model <= 0 or d_model % 8 or d_ff <= 0 or d_ff % 8 or dtype not in ("bfloat16", "float16", "float32"):
        plan.check()
    plan = _packets(plan)
    limit = shared_limit(capability)
    if batch == 1 and capability >= (9, 0) and plan.threads <= 640:
        for depth in (3, 2):
            half = replace(plan, depth=depth, resident=2, overlap=True)
            if half.shared.total + _BLOCK_RESERVED <= (limit + _BLOCK_RESERVED) // 2:
                return half.check()
    # a gated predictor of 8 tokens at d_model 4096 in fp32 is 304 bytes too large with 4 rows a packet
    for depth, rows in ((3, plan.rows), (2, plan.rows), (1, plan.rows), (1, min(2, plan.rows))):
        whole = replace(plan, depth=depth, rows=rows, overlap=capability >= (9, 0))
        if whole.shared.total <= limit:
            return whole.check()
    return whole.check()


def device_facts(device: Any) -> tuple[int, tuple[int, int]]:
    """(SMs, compute capability) of a torch device."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)
