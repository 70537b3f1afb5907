"""The kernels: one persistent launch a layer, put together from the phases; read this file first.

threshold, predictor:  choose -> rest -> sparse -> (barrier) -> reduce
given, down:                     take -> sparse -> (barrier) -> reduce
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, int64, void

from kernels_numba.gpu.choose import make_predictor_select, make_threshold_select
from kernels_numba.gpu.combine import (
    HELD_SHIFT,
    make_reduce,
    make_rest,
    make_restore,
    make_sparse,
    make_store_partial,
    make_take,
)
from kernels_numba.gpu.plan import Plan
from kernels_numba.gpu.stream import HOLE, make_flags, make_stamp, make_stream

# Addresses, 0 where a kind does not use one: x, dense (first projection, or V of the predictor), U, a and b (other
# projections), W_down transposed, residual, y, workspace, indices, values, count, distance of two tokens' values;
# then the threshold and the number of tokens.
ARGUMENTS = (
    "x", "dense", "u", "a", "b", "down", "residual", "y", "workspace", "indices", "values", "count", "value_stride",
    "threshold", "n_tokens",
)  # fmt: skip
SIGNATURE = void(*[int64] * 13, float32, int32)


def make_clear(plan: Plan, dev: Any) -> Any:
    """``clear(...)``: no entry in the held places of the work list."""
    work_at, places, threads, store = plan.shared["work"], plan.held, plan.threads, dev.shared_store_i32
    sync = dev.syncthreads

    @dev.device_function
    def clear(shared, tid):
        for i in range(tid, places, threads):
            store(shared + work_at + i * 4, HOLE)
        sync()

    return clear


def make_finish(plan: Plan, dev: Any) -> Any:
    """``finish(...)``: the end of every kernel, from the block's share of y to the output."""
    store_partial, reduce = make_store_partial(plan, dev), make_reduce(plan, dev)
    flags, done_ws = make_flags(plan, dev), plan.workspace["done"]
    raise_flag, wait, whole, stamp = flags.raise_flag, flags.wait, "reduce" in plan.phases, make_stamp(plan, dev)

    @dev.device_function
    def finish(shared, workspace, epoch, share, residual, y, n_tokens, block, tid):
        stamp(workspace, block, 4, tid)
        store_partial(workspace, block, share, tid)
        if whole:
            raise_flag(workspace + done_ws, block, epoch, tid)
            wait(workspace + done_ws, epoch, tid)
            stamp(workspace, block, 5, tid)
            reduce(shared, workspace, residual, y, n_tokens, block, tid)
            stamp(workspace, block, 6, tid)

    return finish


def make_choosing_kernel(plan: Plan, dev: Any) -> Callable[..., None]:
    """Kernel of CATS, M-COUNTDOWN and the predictor methods."""
    predictor, overlap = plan.kind == "predictor", plan.overlap
    select = make_predictor_select(plan, dev) if predictor else make_threshold_select(plan, dev)
    rest, restore, clear = (make(plan, dev) for make in (make_rest, make_restore, make_clear))
    sparse, start = make_sparse(plan, dev)
    finish, reduce = make_finish(plan, dev), make_reduce(plan, dev)
    read_epoch, counts_ws, store_i = make_flags(plan, dev).epoch, plan.workspace["counts"], dev.store_i32
    stamp = make_stamp(plan, dev)
    selects, sums, reduces = ("select" in plan.phases), ("sparse" in plan.phases), ("reduce" in plan.phases)
    n_rows, spare = plan.d_ff // plan.n_blocks, plan.d_ff % plan.n_blocks
    shared_memory, copy_x, launch_dependents = dev.shared_memory, make_stream(plan, dev).copy_x, dev.launch_dependents

    def kernel(x, dense, u, a, b, down, residual, y, ws, indices, values, count, value_stride, threshold, n_tokens):
        tid, block, shared = cuda.threadIdx.x, cuda.blockIdx.x, shared_memory()
        if overlap:
            launch_dependents()
        stamp(ws, block, 0, tid)
        first, end = block * n_rows + min(block, spare), n_rows + (1 if block < spare else 0)
        found, held, ring, parity, epoch = 0, 0, 0, 0, 0
        if selects or sums:
            clear(shared, tid)
        if selects:
            if predictor:
                found, held, ring, parity, epoch = select(
                    shared, ws, x, dense, u, a, b, down, first, end, threshold, n_tokens, block, tid
                )
            else:
                found, held, ring, parity, epoch = select(
                    shared, ws, x, dense, a, b, down, first, end, threshold, n_tokens, block, tid
                )
            stamp(ws, block, 3, tid)
            if tid == 0:  # for who asks which neurons were active
                store_i(ws + counts_ws + block * 8, found | (held << HELD_SHIFT))
        elif sums:
            epoch = read_epoch(ws, block)
            found, held = restore(shared, ws, block, first, tid)
            copy_x(shared, x, n_tokens, tid)
            start(shared, a, b, down, tid)
        if sums:
            share = sparse(shared, rest(shared, found, held, tid), ring, parity, a, b, down, tid)
            finish(shared, ws, epoch, share, residual, y, n_tokens, block, tid)
        elif reduces:
            reduce(shared, ws, residual, y, n_tokens, block, tid)

    return kernel


def make_listed_kernel(plan: Plan, dev: Any) -> Callable[..., None]:
    """Kernel of a given active set, and of the sparse down projection alone."""
    take, clear, finish, reduce = (make(plan, dev) for make in (make_take, make_clear, make_finish, make_reduce))
    sparse, start = make_sparse(plan, dev)
    overlap, dots, sums = plan.overlap, plan.kind == "given", "sparse" in plan.phases
    shared_memory, copy_x, launch_dependents = dev.shared_memory, make_stream(plan, dev).copy_x, dev.launch_dependents
    ready, read_epoch, stamp = dev.grid_dependency_wait, make_flags(plan, dev).epoch, make_stamp(plan, dev)

    def kernel(x, dense, u, a, b, down, residual, y, ws, indices, values, count, value_stride, threshold, n_tokens):
        tid, block, shared = cuda.threadIdx.x, cuda.blockIdx.x, shared_memory()
        if overlap:
            launch_dependents()
        stamp(ws, block, 0, tid)
        if overlap:
            ready()
        if sums:
            clear(shared, tid)
            taken = take(shared, indices, values, count, value_stride, block, tid)
            if dots:
                copy_x(shared, x, n_tokens, tid)
            start(shared, a, b, down, tid)
            stamp(ws, block, 3, tid)
            share = sparse(shared, taken, 0, 0, a, b, down, tid)
            finish(shared, ws, read_epoch(ws, block), share, residual, y, n_tokens, block, tid)
        else:
            reduce(shared, ws, residual, y, n_tokens, block, tid)

    return kernel


def make_kernel(plan: Plan, dev: Any) -> Callable[..., None]:
    """The undecorated kernel function of a plan; ``dev`` is the module ``device`` or its twin ``simulated``."""
    plan.check()
    return (make_listed_kernel if plan.kind in ("given", "down") else make_choosing_kernel)(plan, dev)
