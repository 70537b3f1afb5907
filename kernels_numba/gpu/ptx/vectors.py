"""Device functions on 16-byte pieces in registers, for the kernels around the MLP; twins in ``simulated_vectors``.

A piece is 8 elements (float32: 4). Tuples of fp32 stand for register arrays: every index is a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from kernels_numba.gpu.ptx.asm import F32, I32, asm, instruction, offset, pack, shared_address, unpack
from kernels_numba.gpu.ptx.device import (  # noqa: F401  kernels reach every device function through this module
    divide,
    exp2,
    launch_dependents,
    load16,
    load_f32,
    load_i32,
    make_load_narrow,
    make_store_narrow,
    make_zeros,
    prefetch,
    shared_load_f32,
    shared_load_i32,
    shared_memory,
    shared_store_f32,
    shared_store_i32,
    store_f32,
    syncthreads,
    widen,
)
from kernels_numba.gpu.ptx.dtypes import elements
from kernels_numba.gpu.ptx.warp import ballot, device_function, lane_of, lane_xor, match_any, shuffle, sync_warp  # noqa: F401

add_i64 = instruction("red.relaxed.gpu.global.add.u64 [$0], $1;", types.void, types.int64, types.int64)
# What the block wrote before its barrier is seen by whoever finds the count raised.
atomic_add_acq_rel = instruction("atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;", types.int32, types.int64, types.int32)

_WORDS = types.UniTuple(types.int32, 4)


def make_piece_widen(dtype: str) -> Callable[..., Any]:
    """``widen(words)``: the elements of a piece in fp32."""
    kind = types.UniTuple(types.float32, elements(dtype))

    @intrinsic
    def piece_widen(context: Any, words: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return pack(ctx, builder, kind, widen(builder, unpack(builder, args[0], 4), dtype))

        return kind(_WORDS), codegen

    return piece_widen


def make_piece_store(dtype: str) -> Callable[..., Any]:
    """``store(address, values)``: round to nearest even and store a piece in global memory."""
    n = elements(dtype)

    @intrinsic
    def piece_store(context: Any, address: Any, values: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            parts = unpack(builder, args[1], n)
            if dtype == "float32":
                words = [builder.bitcast(part, I32) for part in parts]
            else:
                text = f"cvt.rn.{'bf16x2' if dtype == 'bfloat16' else 'f16x2'}.f32 $0, $1, $2;"  # upper half first
                words = [asm(builder, I32, text, "=r,f,f", [parts[i + 1], parts[i]], pure=True) for i in range(0, n, 2)]
            asm(builder, ir.VoidType(), "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r", [args[0], *words])
            return cgutils.get_null_value(ir.IntType(8).as_pointer())

        return types.void(types.int64, types.UniTuple(types.float32, n)), codegen

    return piece_store


def make_piece_dot(dtype: str, n: int) -> Callable[..., Any]:
    """``dot(words, vectors)``: products of a piece with ``n`` fp32 vectors of its length, laid end to end."""
    size, kind = elements(dtype), types.UniTuple(types.float32, n)

    @intrinsic
    def piece_dot(context: Any, words: Any, vectors: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            row = widen(builder, unpack(builder, args[0], 4), dtype)
            given, totals = unpack(builder, args[1], n * size), []
            for i in range(n):
                total = F32(0.0)
                for e in range(size):
                    total = builder.fma(row[e], given[i * size + e], total)
                totals.append(total)
            return pack(ctx, builder, kind, totals)

        return kind(_WORDS, types.UniTuple(types.float32, n * size)), codegen

    return piece_dot


def make_piece_add(dtype: str, n: int) -> Callable[..., Any]:
    """``add(words, factors, total)``: the piece times each of ``n`` factors, added to ``total``, laid end to end."""
    size = elements(dtype)
    kind = types.UniTuple(types.float32, n * size)

    @intrinsic
    def piece_add(context: Any, words: Any, factors: Any, total: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            row = widen(builder, unpack(builder, args[0], 4), dtype)
            factor, sums = unpack(builder, args[1], n), unpack(builder, args[2], n * size)
            for i in range(n):
                for e in range(size):
                    sums[i * size + e] = builder.fma(factor[i], row[e], sums[i * size + e])
            return pack(ctx, builder, kind, sums)

        return kind(_WORDS, types.UniTuple(types.float32, n), kind), codegen

    return piece_add


def make_shared_floats(n_rows: int, n: int, stride: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``load(address)`` and ``store(address, values)``: ``n_rows`` rows of ``n`` fp32, ``stride`` bytes apart, shared.

    16 bytes at a time if ``n`` is a multiple of 4.
    """
    kind, wide = types.UniTuple(types.float32, n_rows * n), 1 if n % 4 else 4
    places = [row * stride + e * 4 for row in range(n_rows) for e in range(0, n, wide)]
    vector, names = ("", "$0") if wide == 1 else (".v4", "{$0, $1, $2, $3}")

    @intrinsic
    def load(context: Any, address: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            found, result = [], F32 if wide == 1 else ir.LiteralStructType([F32] * 4)
            for by in places:
                place = shared_address(builder, offset(builder, args[0], by))
                text, constraints = f"ld.shared{vector}.f32 {names}, [${wide}];", "=f," * wide + "r"
                words = asm(builder, result, text, constraints, [place])
                found += [words] if wide == 1 else [builder.extract_value(words, i) for i in range(4)]
            return pack(ctx, builder, kind, found)

        return kind(types.int64), codegen

    @intrinsic
    def store(context: Any, address: Any, values: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            parts = unpack(builder, args[1], n_rows * n)
            for number, by in enumerate(places):
                place = shared_address(builder, offset(builder, args[0], by))
                text, constraints = f"st.shared{vector}.f32 [${wide}], {names};", "f," * wide + "r"
                asm(builder, ir.VoidType(), text, constraints, [*parts[number * wide : (number + 1) * wide], place])
            return cgutils.get_null_value(ir.IntType(8).as_pointer())

        return types.void(types.int64, kind), codegen

    return load, store


def make_lanes_total(n: int, begin: int, end: int) -> Callable[..., Any]:
    """``total(values)``: ``n`` sums over the lanes whose numbers differ in the bits from ``begin`` up to, not with, ``end``."""
    kind = types.UniTuple(types.float32, n)

    @intrinsic
    def lanes_total(context: Any, values: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            sums, bit = unpack(builder, args[0], n), begin
            while bit < end:
                sums = [builder.fadd(one, shuffle(builder, one, I32(bit), "bfly")) for one in sums]
                bit *= 2
            return pack(ctx, builder, kind, sums)

        return kind(kind), codegen

    return lanes_total


def _elementwise(dtype: str, n_tuples: int, n_scalars: int, make: Callable[..., Any]) -> Callable[..., Any]:
    """Device function (tuples, scalars) -> tuple whose elements are ``make(builder, one of each tuple, scalars)``."""
    n = elements(dtype)
    kind = types.UniTuple(types.float32, n)
    given = (kind,) * n_tuples + (types.float32,) * n_scalars

    def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        tuples, scalars = [unpack(builder, a, n) for a in args[:n_tuples]], args[n_tuples:]
        return pack(
            ctx, builder, kind, [make(builder, *elements_, *scalars) for elements_ in zip(*tuples, strict=True)]
        )

    if len(given) == 1:
        return intrinsic(lambda context, a: (kind(*given), codegen))
    if len(given) == 2:
        return intrinsic(lambda context, a, b: (kind(*given), codegen))
    return intrinsic(lambda context, a, b, c: (kind(*given), codegen))


def make_pieces_add(dtype: str) -> Callable[..., Any]:
    """``add(a, b)``: sums of two pieces in fp32."""
    return _elementwise(dtype, 2, 0, lambda builder, a, b: builder.fadd(a, b))


def make_pieces_scale(dtype: str, by: float) -> Callable[..., Any]:
    """``scale(values, weights, factor)``: ``values * factor * (weights + by)``."""
    return _elementwise(
        dtype, 2, 1, lambda builder, v, w, f: builder.fmul(builder.fmul(v, f), builder.fadd(w, F32(by)))
    )


def make_pieces_round(dtype: str) -> Callable[..., Any]:
    """``rounded(values)``: to ``dtype`` (nearest even) and back."""
    kind = {"bfloat16": "bf16", "float16": "f16", "float32": ""}[dtype]
    back = "mov.b32 $0, {z, h};" if dtype == "bfloat16" else "cvt.f32.f16 $0, h;"
    text = f"{{ .reg .b16 h, z; mov.b16 z, 0; cvt.rn.{kind}.f32 h, $1; {back} }}"
    return _elementwise(
        dtype, 1, 0, lambda builder, v: v if not kind else asm(builder, F32, text, "=f,f", [v], pure=True)
    )


def make_square_sum(dtype: str) -> Callable[..., Any]:
    """``total(values)``: sum of a piece's squares."""
    n = elements(dtype)

    @intrinsic
    def square_sum(context: Any, values: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            total = F32(0.0)
            for value in unpack(builder, args[0], n):
                total = builder.fma(value, value, total)
            return total

        return types.float32(types.UniTuple(types.float32, n)), codegen

    return square_sum
