"""The kernels: one persistent launch a layer, put together from the phases; read this file first.

threshold:                  choose_and_add -> (barrier) -> reduce
predictor:  select (z -> barrier -> logits) -> balanced -> (barrier) -> reduce
given, down:                take -> sparse -> (barrier) -> reduce
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, int64, void

from kernels_numba.gpu.mlp.balance import make_balanced
from kernels_numba.gpu.mlp.grid_barrier import make_flags
from kernels_numba.gpu.mlp.plan import Plan
from kernels_numba.gpu.mlp.predictor import make_predictor_select
from kernels_numba.gpu.mlp.reduce import make_reduce, make_store_partial
from kernels_numba.gpu.mlp.ring import make_tokens
from kernels_numba.gpu.mlp.sparse_rows import make_sparse
from kernels_numba.gpu.mlp.threshold import make_choose_and_add
from kernels_numba.gpu.mlp.trace import make_stamp
from kernels_numba.gpu.mlp.work_list import make_clear, make_recall, make_take
from kernels_numba.gpu.mlp.work_queue import make_claim, make_clear_slots

# Addresses, 0 where a kind does not use one: x, dense (first projection, or V of the predictor), U, a and b (other
# projections), W_down transposed, residual, y, workspace, indices, values (coefficients; of ``threshold`` the factors of the
# neurons, of a gated predictor what each part misses), count, distance of two tokens' values; then the threshold and the
# number of tokens.
ARGUMENTS = (
    "x", "dense", "u", "a", "b", "down", "residual", "y", "workspace", "indices", "values", "count", "value_stride",
    "threshold", "n_tokens",
)  # fmt: skip
SIGNATURE = void(*[int64] * 13, float32, int32)


def make_finish(plan: Plan, dev: Any) -> Any:
    """``finish(...)``: the end of every kernel, from the block's share of y to the output."""
    store_partial, reduce = make_store_partial(plan, dev), make_reduce(plan, dev)
    flags, area, stamp = make_flags(plan, dev), plan.workspace, make_stamp(plan, dev)
    raise_flag, wait, sums, reduces = flags.raise_flag, flags.wait, "sparse" in plan.phases, "reduce" in plan.phases

    @dev.device_function
    def finish(shared, workspace, epoch, share, residual, y, n_tokens, block, tid):
        if sums:
            stamp(workspace, block, 4, tid)
            store_partial(workspace, block, share, tid)
            if reduces:
                raise_flag(workspace + area.done, block, epoch, tid)
                wait(workspace + area.done, epoch, tid)
                stamp(workspace, block, 5, tid)
        if reduces:
            reduce(shared, workspace, residual, y, n_tokens, block, tid)
            stamp(workspace, block, 6, tid)

    return finish


def make_threshold_kernel(plan: Plan, dev: Any) -> Callable[..., None]:
    """Kernel of CATS and M-COUNTDOWN."""
    claimed, threads, overlap, area = plan.claims, plan.threads, plan.overlap, plan.workspace
    choose_and_add, finish, stamp = (make(plan, dev) for make in (make_choose_and_add, make_finish, make_stamp))
    claim, clear_slots, sums = make_claim(plan, dev), make_clear_slots(plan, dev), "sparse" in plan.phases
    zeros = dev.make_zeros(plan.batch * plan.chunks * plan.vector)

    def kernel(x, dense, u, a, b, down, residual, y, ws, indices, values, count, value_stride, threshold, n_tokens):
        tid, block, shared = cuda.threadIdx.x, cuda.blockIdx.x, dev.shared_memory()
        if overlap:
            dev.launch_dependents()
        stamp(ws, block, 0, tid)
        if claimed:
            clear_slots(shared, tid)
            dev.syncthreads()  # the last barrier of the claiming warp
        if claimed and tid >= threads:
            if tid == threads and sums:
                claim(shared, ws, block)
        else:
            share, epoch = zeros(), 0
            if sums:
                share, found, epoch = choose_and_add(
                    shared, ws, x, dense, a, b, down, values, threshold, n_tokens, block, tid
                )
                if tid == 0:  # for those who ask how many neurons were active
                    dev.store_i32(ws + area.counts + block * 8, found)
            finish(shared, ws, epoch, share, residual, y, n_tokens, block, tid)

    return kernel


def make_predictor_kernel(plan: Plan, dev: Any) -> Callable[..., None]:
    """Kernel of the predictor methods."""
    select, recall, clear = make_predictor_select(plan, dev), make_recall(plan, dev), make_clear(plan, dev)
    deals, balanced = plan.deals, make_balanced(plan, dev) if plan.deals else None
    (sparse, start), finish, held_places = make_sparse(plan, dev), make_finish(plan, dev), plan.held
    read_epoch, stamp, overlap = make_flags(plan, dev).epoch, make_stamp(plan, dev), plan.overlap
    selects, sums = ("project" in plan.phases or "select" in plan.phases), ("sparse" in plan.phases)
    n_rows, spare = plan.d_ff // plan.n_blocks, plan.d_ff % plan.n_blocks
    zeros = dev.make_zeros(plan.batch * plan.chunks * plan.vector)
    copy_x = make_tokens(plan, dev).copy_x

    def kernel(x, dense, u, a, b, down, residual, y, ws, indices, values, count, value_stride, threshold, n_tokens):
        tid, block, shared = cuda.threadIdx.x, cuda.blockIdx.x, dev.shared_memory()
        if overlap:
            dev.launch_dependents()
        stamp(ws, block, 0, tid)
        first, mine = block * n_rows + min(block, spare), n_rows + (1 if block < spare else 0)
        found, epoch, share = 0, 0, zeros()
        clear(shared, tid)
        if selects:
            found, epoch = select(shared, ws, x, dense, u, values, first, mine, threshold, n_tokens, block, tid)
            stamp(ws, block, 3, tid)
        elif sums:
            epoch = read_epoch(ws, block)
            found = recall(shared, ws, block, first, epoch, tid)
            copy_x(shared, x, n_tokens, tid)
        if sums:
            if deals:
                share = balanced(shared, ws, epoch, found, a, b, down, block, tid)
            else:
                start(shared, a, b, down, tid)
                share = sparse(shared, max(0, found - held_places), 0, 0, a, b, down, tid)
        finish(shared, ws, epoch, share, residual, y, n_tokens, block, tid)

    return kernel


def make_listed_kernel(plan: Plan, dev: Any) -> Callable[..., None]:
    """Kernel of a given active set, and of the sparse down projection alone."""
    take, clear, finish = (make(plan, dev) for make in (make_take, make_clear, make_finish))
    sparse, start = make_sparse(plan, dev)
    overlap, dots, sums = plan.overlap, plan.kind == "given", "sparse" in plan.phases
    copy_x, read_epoch, stamp = make_tokens(plan, dev).copy_x, make_flags(plan, dev).epoch, make_stamp(plan, dev)
    zeros = dev.make_zeros(plan.batch * plan.chunks * plan.vector)

    def kernel(x, dense, u, a, b, down, residual, y, ws, indices, values, count, value_stride, threshold, n_tokens):
        tid, block, shared = cuda.threadIdx.x, cuda.blockIdx.x, dev.shared_memory()
        if overlap:
            dev.launch_dependents()
        stamp(ws, block, 0, tid)
        if overlap:
            dev.grid_dependency_wait()
        share, epoch = zeros(), 0
        if sums:
            clear(shared, tid)
            taken = take(shared, indices, values, count, value_stride, block, tid)
            if dots:
                copy_x(shared, x, n_tokens, tid)
            start(shared, a, b, down, tid)
            stamp(ws, block, 3, tid)
            share = sparse(shared, taken, 0, 0, a, b, down, tid)
            epoch = read_epoch(ws, block)
        finish(shared, ws, epoch, share, residual, y, n_tokens, block, tid)

    return kernel


def make_kernel(plan: Plan, dev: Any) -> Callable[..., None]:
    """The undecorated kernel function of a plan; ``dev`` is the module ``ptx.device`` or its twin."""
    plan.check()
    makers = {"threshold": make_threshold_kernel, "predictor": make_predictor_kernel}
    return makers.get(plan.kind, make_listed_kernel)(plan, dev)
