"""Device functions of the CUDA kernels: asynchronous copies, wide loads, dot products, grid flags; lanes in ``warp``.

What the PTX level adds to Numba, written with ``asm``; ``simulated`` holds a twin of each function for Numba's simulator.
Addresses, of global and of shared memory alike, are plain integers. A "row" is one row of a weight matrix as the block
sees it: every thread holds 16 bytes of it (``chunks`` times 16 if the row is longer than the block is wide).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from kernels_numba.gpu.ptx.asm import F32, I16, I32, I64, asm, instruction, offset, pack, shared_address, unpack
from kernels_numba.gpu.ptx.dtypes import elements
from kernels_numba.gpu.ptx.warp import (  # noqa: F401  kernels reach every device function through this module
    ballot,
    device_function,
    lane_of,
    lane_xor,
    make_lanes_fold,
    make_lanes_spread,
    make_lanes_sum,
    sync_warp,
)

syncthreads = cuda.syncthreads
SPIN_LIMIT = -1  # wait for the other blocks as long as it takes

prefetch = instruction("prefetch.global.L2 [$0];", types.void, types.int64)

# asynchronous copies into the block's shared memory -------------------------------------------------------------------
copy_commit = instruction("cp.async.commit_group;", types.void)
launch_dependents = instruction("griddepcontrol.launch_dependents;", types.void)
grid_dependency_wait = instruction("griddepcontrol.wait;", types.void)
copy4 = instruction("cp.async.ca.shared.global [$0], [$1], 4;", types.void, types.int64, types.int64, shared=True)


def make_barrier(threads: int) -> Callable[..., Any]:
    """``sync()``: barrier of the block's first ``threads`` threads, whole warps; the claiming warp runs on."""
    return instruction(f"barrier.sync.aligned 1, {threads};", types.void)


# single words ---------------------------------------------------------------------------------------------------------
shared_load_i32 = instruction("ld.shared.b32 $0, [$1];", types.int32, types.int64, shared=True)
shared_load_f32 = instruction("ld.shared.f32 $0, [$1];", types.float32, types.int64, shared=True)
shared_store_i32 = instruction("st.shared.b32 [$0], $1;", types.void, types.int64, types.int32, shared=True)
shared_store_f32 = instruction("st.shared.f32 [$0], $1;", types.void, types.int64, types.float32, shared=True)
# What another block wrote in this launch is read through L2: relaxed at device scope never hits a stale L1 line.
load_i32 = instruction("ld.relaxed.gpu.global.b32 $0, [$1];", types.int32, types.int64)
load_f32 = instruction("ld.relaxed.gpu.global.f32 $0, [$1];", types.float32, types.int64)
store_i32 = instruction("st.relaxed.gpu.global.b32 [$0], $1;", types.void, types.int64, types.int32)
store_f32 = instruction("st.relaxed.gpu.global.f32 [$0], $1;", types.void, types.int64, types.float32)
# Flags between blocks: what the block wrote before a release is seen by whoever reads the flag with acquire.
flag_store = instruction("st.release.gpu.global.u64 [$0], $1;", types.void, types.int64, types.int64)
flag_load = instruction("ld.acquire.gpu.global.u64 $0, [$1];", types.int64, types.int64)
# Tagged words between blocks: 32 bits of data and, in the upper half, the number of the launch. One 64-bit access moves
# both, so a reader that finds its own launch's number has the data: no fence, no flag, nothing to clear.
_TAG = "{ .reg .b64 t; mov.b64 t, {$1, $2}; st.relaxed.gpu.global.b64 [$0], t; }"
_WAIT = (
    "{ .reg .pred p; .reg .b32 v, e; .reg .b64 t; AGAIN: ld.relaxed.gpu.global.b64 t, [$1]; mov.b64 {v, e}, t; "
    "setp.ne.b32 p, e, $2; @p bra AGAIN; mov.b32 $0, v; }"
)
store_tagged_i32 = instruction(_TAG, types.void, types.int64, types.int32, types.int32)
store_tagged_f32 = instruction(_TAG, types.void, types.int64, types.float32, types.int32)
wait_tagged_i32 = instruction(_WAIT, types.int32, types.int64, types.int32)
wait_tagged_f32 = instruction(_WAIT, types.float32, types.int64, types.int32)
# Claims: a thread adds to a global counter and tells one thread of the block through tagged words in shared memory, with
# no barrier between them: both sides use atomics, which racecheck knows to be no race.
atomic_add = instruction("atom.relaxed.gpu.global.add.u32 $0, [$1], $2;", types.int32, types.int64, types.int32)
_SHARED_TELL = "{ .reg .b64 t; mov.b64 t, {$1, $2}; atom.relaxed.cta.shared.exch.b64 t, [$0], t; }"
_SHARED_WAIT = (
    "{ .reg .pred p; .reg .b32 v, e; .reg .b64 t; AGAIN: atom.relaxed.cta.shared.cas.b64 t, [$1], 0, 0; mov.b64 {v, e}, t; "
    "setp.ne.b32 p, e, $2; @p bra AGAIN; mov.b32 $0, v; }"
)
shared_tell = instruction(_SHARED_TELL, types.void, types.int64, types.int32, types.int32, shared=True)
shared_tell_i32 = instruction(
    "{ .reg .b32 t; atom.relaxed.cta.shared.exch.b32 t, [$0], $1; }", types.void, types.int64, types.int32, shared=True
)
shared_wait = instruction(_SHARED_WAIT, types.int32, types.int64, types.int32, shared=True)
shared_tell_f32 = instruction(_SHARED_TELL, types.void, types.int64, types.float32, types.int32, shared=True)
shared_wait_f32 = instruction(_SHARED_WAIT, types.float32, types.int64, types.int32, shared=True)
shared_wait_above = instruction(
    "{ .reg .pred p; .reg .b32 v; AGAIN: atom.relaxed.cta.shared.or.b32 v, [$0], 0; setp.gt.s32 p, v, $1; @p bra DONE; "
    "nanosleep.u32 20; bra AGAIN; DONE: }",
    types.void, types.int64, types.int32, shared=True,
)  # fmt: skip
store_clock = instruction("{ .reg .b64 t; mov.u64 t, %clock64; st.global.b64 [$0], t; }", types.void, types.int64)
exp2 = instruction("ex2.approx.f32 $0, $1;", types.float32, types.float32, pure=True)
divide = instruction("div.full.f32 $0, $1, $2;", types.float32, types.float32, types.float32, pure=True)
sqrt = instruction("sqrt.rn.f32 $0, $1;", types.float32, types.float32, pure=True)
popcount = instruction("popc.b32 $0, $1;", types.int32, types.int32, pure=True)


def make_wait_tagged(n: int) -> Callable[..., Any]:
    """``wait(address, limit, tag)``: data of the first ``limit`` of ``n`` fp32 words as soon as all have the tag, 0 for the others.

    They are asked for together, so that a round takes one trip.
    """
    kind = types.UniTuple(types.float32, n)
    names = range(n)
    text = f"{{ .reg .pred p, {', '.join(f'q{i}' for i in names)}; .reg .b32 e, z; .reg .b64 {', '.join(f't{i}' for i in names)}; "
    text += "mov.b32 z, 0; "
    text += "".join(f"setp.gt.s32 q{i}, ${n + 1}, {i}; mov.b64 t{i}, {{z, ${n + 2}}}; " for i in names) + "AGAIN: "
    text += "".join(f"@q{i} ld.relaxed.gpu.global.b64 t{i}, [${n}+{8 * i}]; " for i in names) + "setp.ne.b32 p, z, z; "
    text += "".join(f"mov.b64 {{${i}, e}}, t{i}; setp.ne.or.b32 p, e, ${n + 2}, p; " for i in names) + "@p bra AGAIN; }"

    @intrinsic
    def wait_tagged(context: Any, address: Any, limit: Any, tag: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            values = [args[0], builder.trunc(args[1], I32), args[2]]
            words = asm(builder, ir.LiteralStructType([F32] * n), text, "=&f," * n + "l,r,r", values)
            return pack(ctx, builder, kind, [builder.extract_value(words, i) for i in names])

        return kind(types.int64, types.int64, types.int32), codegen

    return wait_tagged


def make_copy(hint: str = "L2::128B") -> Callable[..., Any]:
    """``copy(shared, global, size)``: 16 bytes, read past L1; ``size`` 0 reads nothing and writes zeros."""

    @intrinsic
    def copy16(context: Any, destination: Any, source: Any, size: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            text = f"cp.async.cg.shared.global{'.' + hint if hint else ''} [$0], [$1], 16, $2;"
            values = [shared_address(builder, args[0]), args[1], builder.trunc(args[2], I32)]
            asm(builder, ir.VoidType(), text, "r,l,r", values)
            return cgutils.get_null_value(ir.IntType(8).as_pointer())

        return types.void(types.int64, types.int64, types.int64), codegen

    return copy16


def make_copy_wait(pending: int) -> Callable[..., Any]:
    """``wait()``: all of this thread's groups but the newest ``pending`` have landed."""
    return instruction(f"cp.async.wait_group {pending};", types.void)


@intrinsic
def shared_memory(context: Any) -> Any:
    """Address of the block's dynamic shared memory."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, _args: Any) -> Any:
        name, module = "countdown_shared", builder.module
        if name in module.globals:
            memory = module.globals[name]
        else:
            memory = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), 0), name, addrspace=3)
            memory.align, memory.linkage = 16, "external"
        return builder.ptrtoint(memory, I64)

    return types.int64(), codegen


# wide values ----------------------------------------------------------------------------------------------------------
def _load16(builder: Any, address: Any, space: str) -> list[Any]:
    result = ir.LiteralStructType([I32] * 4)
    kind = {"shared": "ld.shared.v4.b32", "global": "ld.relaxed.gpu.global.v4.b32"}[space]
    letter = "r" if space == "shared" else "l"
    words = asm(builder, result, kind + " {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r," + letter, [address])
    return [builder.extract_value(words, i) for i in range(4)]


def widen(builder: Any, words: Sequence[Any], dtype: str) -> list[Any]:
    """The 8 (float32: 4) elements of a 16-byte piece, in fp32."""
    if dtype == "float32":
        return [builder.bitcast(w, F32) for w in words]
    out = []
    for w in words:
        if dtype == "bfloat16":  # a bf16 is the upper half of an fp32
            out.append(builder.bitcast(builder.shl(w, I32(16)), F32))
            out.append(builder.bitcast(builder.and_(w, I32(0xFFFF0000)), F32))
        else:
            for half in (builder.trunc(w, I16), builder.trunc(builder.lshr(w, I32(16)), I16)):
                out.append(builder.fpext(builder.bitcast(half, ir.HalfType()), F32))
    return out


@intrinsic
def shared_store16(context: Any, address: Any, words: Any) -> Any:
    """Store a tuple of 4 int32 at a shared address."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        values = [shared_address(builder, args[0]), *unpack(builder, args[1], 4)]
        asm(builder, ir.VoidType(), "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", values)
        return cgutils.get_null_value(ir.IntType(8).as_pointer())

    return types.void(types.int64, types.UniTuple(types.int32, 4)), codegen


@intrinsic
def load16(context: Any, address: Any) -> Any:
    """16 bytes of global memory that another block or the kernel before may have written, as 4 int32."""
    kind = types.UniTuple(types.int32, 4)

    def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return pack(ctx, builder, kind, _load16(builder, args[0], "global"))

    return kind(types.int64), codegen


def make_rows_dot(
    dtype: str, n_rows: int, batch: int, chunks: int, row_stride: int, chunk_stride: int
) -> Callable[..., Any]:
    """``dot(rows, x)``: this thread's share of the dot products of ``n_rows`` rows with ``batch`` vectors.

    Both addresses are shared ones and include the thread's own offset; element [row, token] of the returned tuple is
    at ``row * batch + token``. fp32 fused multiply-adds.
    """
    kind = types.UniTuple(types.float32, n_rows * batch)

    @intrinsic
    def rows_dot(context: Any, rows: Any, x: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            total = [F32(0.0)] * (n_rows * batch)
            at, x_at = args
            for c in range(chunks):
                words = [
                    _load16(
                        builder,
                        shared_address(builder, offset(builder, at, r * row_stride + c * chunk_stride)),
                        "shared",
                    )
                    for r in range(n_rows)
                ]
                for b in range(batch):
                    place = shared_address(builder, offset(builder, x_at, (b * chunks + c) * chunk_stride))
                    vector = widen(builder, _load16(builder, place, "shared"), dtype)
                    for r in range(n_rows):
                        for w, v in zip(widen(builder, words[r], dtype), vector, strict=True):
                            total[r * batch + b] = builder.fma(w, v, total[r * batch + b])
            return pack(ctx, builder, kind, total)

        return kind(types.int64, types.int64), codegen

    return rows_dot


def make_rows_dot_f32(dtype: str, n_rows: int, batch: int, row_stride: int, z_stride: int) -> Callable[..., Any]:
    """``dot(rows, z)``: as ``make_rows_dot`` for one 16-byte piece a row and vectors stored in fp32."""
    kind = types.UniTuple(types.float32, n_rows * batch)

    @intrinsic
    def rows_dot_f32(context: Any, rows: Any, z: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            total = [F32(0.0)] * (n_rows * batch)
            words = [
                _load16(builder, shared_address(builder, offset(builder, args[0], r * row_stride)), "shared")
                for r in range(n_rows)
            ]
            for b in range(batch):
                vector: list[Any] = []
                for part in range(elements(dtype) // 4):
                    place = shared_address(builder, offset(builder, args[1], b * z_stride + part * 16))
                    vector += [builder.bitcast(w, F32) for w in _load16(builder, place, "shared")]
                for r in range(n_rows):
                    for w, v in zip(widen(builder, words[r], dtype), vector, strict=True):
                        total[r * batch + b] = builder.fma(w, v, total[r * batch + b])
            return pack(ctx, builder, kind, total)

        return kind(types.int64, types.int64), codegen

    return rows_dot_f32


def make_rows_add(
    dtype: str, n_rows: int, batch: int, chunks: int, row_stride: int, chunk_stride: int
) -> Callable[..., Any]:
    """``add(rows, v, y)``: ``y[token] + sum_row v[row, token] * row`` for the thread's columns, as a new tuple."""
    per_chunk = elements(dtype)
    n = batch * chunks * per_chunk
    kind = types.UniTuple(types.float32, n)

    @intrinsic
    def rows_add(context: Any, rows: Any, v: Any, y: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            scale = unpack(builder, args[1], n_rows * batch)
            total = unpack(builder, args[2], n)
            for r in range(n_rows):
                for c in range(chunks):
                    place = shared_address(builder, offset(builder, args[0], r * row_stride + c * chunk_stride))
                    row = widen(builder, _load16(builder, place, "shared"), dtype)
                    for b in range(batch):
                        for e in range(per_chunk):
                            i = (b * chunks + c) * per_chunk + e
                            total[i] = builder.fma(scale[r * batch + b], row[e], total[i])
            return pack(ctx, builder, kind, total)

        return kind(types.int64, types.UniTuple(types.float32, n_rows * batch), kind), codegen

    return rows_add


def make_zeros(n: int) -> Callable[..., Any]:
    """``zeros()``: a tuple of ``n`` fp32 zeros."""
    kind = types.UniTuple(types.float32, n)

    @intrinsic
    def zeros(context: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, _args: Any) -> Any:
            return pack(ctx, builder, kind, [F32(0.0)] * n)

        return kind(), codegen

    return zeros


def make_store_columns(dtype: str, batch: int, chunks: int, token_stride: int, chunk_stride: int) -> Callable[..., Any]:
    """``store(address, y, chunk, n)``: write the thread's columns of every token as fp32.

    ``address`` includes the thread's offset; piece c is written only if ``chunk + c * n_threads < n`` held by the caller
    through ``limit``: the number of this thread's pieces that exist.
    """
    per_chunk = elements(dtype)
    kind = types.UniTuple(types.float32, batch * chunks * per_chunk)

    @intrinsic
    def store_columns(context: Any, address: Any, y: Any, limit: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            values = unpack(builder, args[1], batch * chunks * per_chunk)
            for c in range(chunks):
                with builder.if_then(builder.icmp_signed(">", args[2], I64(c))):
                    for b in range(batch):
                        for part in range(0, per_chunk, 4):
                            place = offset(builder, args[0], b * token_stride + c * chunk_stride + part * 4)
                            i = (b * chunks + c) * per_chunk + part
                            text = "st.relaxed.gpu.global.v4.f32 [$0], {$1, $2, $3, $4};"
                            asm(builder, ir.VoidType(), text, "l,f,f,f,f", [place, *values[i : i + 4]])
            return cgutils.get_null_value(ir.IntType(8).as_pointer())

        return types.void(types.int64, kind, types.int64), codegen

    return store_columns


def make_sum_strided(n: int, stride: int) -> Callable[..., Any]:
    """``total(address, count)``: sum of the first ``count`` of ``n`` fp32 quadruples ``stride`` bytes apart, in order.

    All loads are in flight at once. Written by other blocks, so read through L2.
    """
    kind = types.UniTuple(types.float32, 4)
    result = ir.LiteralStructType([F32] * 4)

    @intrinsic
    def sum_strided(context: Any, address: Any, count: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            count32, parts = builder.trunc(args[1], I32), []
            for i in range(n):
                text = (
                    "{ .reg .pred p; setp.gt.s32 p, $5, $6; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
                    "mov.b32 $3, 0; @p ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4]; }"
                )
                values = [offset(builder, args[0], i * stride), count32, I32(i)]
                parts.append(asm(builder, result, text, "=&f,=&f,=&f,=&f,l,r,r", values))
            total = [F32(0.0)] * 4
            for part in parts:
                total = [builder.fadd(total[k], builder.extract_value(part, k)) for k in range(4)]
            return pack(ctx, builder, kind, total)

        return kind(types.int64, types.int64), codegen

    return sum_strided


def make_store_narrow(dtype: str) -> Callable[..., Any]:
    """``store(address, value)``: round to nearest even and store one element of ``dtype``."""
    if dtype == "float32":
        return store_f32
    kind = "bf16" if dtype == "bfloat16" else "f16"
    text = f"{{ .reg .b16 h; cvt.rn.{kind}.f32 h, $1; st.global.b16 [$0], h; }}"
    return instruction(text, types.void, types.int64, types.float32)


def make_load_narrow(dtype: str) -> Callable[..., Any]:
    """``load(address)``: one element of ``dtype`` of global memory in fp32."""
    if dtype == "float32":
        return load_f32
    if dtype == "bfloat16":
        text = "{ .reg .b16 h, z; .reg .b32 w; ld.relaxed.gpu.global.b16 h, [$1]; mov.b16 z, 0; mov.b32 w, {z, h}; mov.b32 $0, w; }"
    else:
        text = "{ .reg .b16 h; ld.relaxed.gpu.global.b16 h, [$1]; cvt.f32.f16 $0, h; }"
    return instruction(text, types.float32, types.int64)
