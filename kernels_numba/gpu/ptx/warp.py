"""Device functions that exchange values between the lanes of a warp; ``simulated`` holds a twin of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from kernels_numba.gpu.ptx.asm import F32, I32, asm, pack, unpack

device_function = cuda.jit(device=True, forceinline=True)
_FULL_WARP = 0xFFFFFFFF


def shuffle(builder: Any, value: Any, lane: Any, mode: str) -> Any:
    """LLVM value of a lane's ``value``, the warp's lanes chosen by ``mode``: bfly, idx, up."""
    suffix = "f32" if value.type == F32 else "i32"
    kind = ir.FunctionType(value.type, [I32, value.type, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.nvvm.shfl.sync.{mode}.{suffix}")
    return builder.call(function, [I32(_FULL_WARP), value, lane, I32(0 if mode == "up" else 31)])


def _lane(builder: Any) -> Any:
    return asm(builder, I32, "mov.u32 $0, %laneid;", "=r", [], pure=True)


def make_lanes_sum(n: int) -> Callable[..., Any]:
    """``lanes_sum(values)``: sums over the warp of ``n`` values; lane l gets that of value l // (32 / m).

    m is ``n`` rounded up to a power of 2. Halves are exchanged, so it costs m - 1 + log2(32 / m) shuffles, not 5 n.
    """
    padding = (1 << (n - 1).bit_length()) - n

    @intrinsic
    def lanes_sum(context: Any, values: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            left, lane = unpack(builder, args[0], n) + [F32(0.0)] * padding, _lane(builder)
            for offset in (16, 8, 4, 2, 1):
                if len(left) == 1:
                    left = [builder.fadd(left[0], shuffle(builder, left[0], I32(offset), "bfly"))]
                    continue
                half = len(left) // 2
                upper = builder.icmp_signed("!=", builder.and_(lane, I32(offset)), I32(0))
                left = [
                    builder.fadd(
                        builder.select(upper, high, low),
                        shuffle(builder, builder.select(upper, low, high), I32(offset), "bfly"),
                    )
                    for low, high in zip(left[:half], left[half:], strict=True)
                ]
            return left[0]

        return types.float32(types.UniTuple(types.float32, n)), codegen

    return lanes_sum


def make_lanes_fold(width: int) -> Callable[..., Any]:
    """``fold(value)``: sum over each aligned group of ``width`` lanes, in every lane of it."""

    @intrinsic
    def lanes_fold(context: Any, value: Any) -> Any:
        def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            total, offset = args[0], width // 2
            while offset:
                total = builder.fadd(total, shuffle(builder, total, I32(offset), "bfly"))
                offset //= 2
            return total

        return types.float32(types.float32), codegen

    return lanes_fold


def make_lanes_spread(n: int, stride: int) -> Callable[..., Any]:
    """``spread(value)``: tuple of the values of lanes 0, stride, ... (n of them), the same in every lane."""
    kind = types.UniTuple(types.float32, n)

    @intrinsic
    def lanes_spread(context: Any, value: Any) -> Any:
        def codegen(ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
            return pack(ctx, builder, kind, [shuffle(builder, args[0], I32(i * stride), "idx") for i in range(n)])

        return kind(types.float32), codegen

    return lanes_spread


@intrinsic
def lane_xor(context: Any, value: Any, mask: Any) -> Any:
    """Value of lane ``lane ^ mask``."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return shuffle(builder, args[0], builder.trunc(args[1], I32), "bfly")

    return types.float32(types.float32, types.int64), codegen


@intrinsic
def lane_of(context: Any, value: Any, lane: Any) -> Any:
    """Integer of another lane of the warp."""

    def codegen(_ctx: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return shuffle(builder, args[0], builder.trunc(args[1], I32), "idx")

    return types.int32(types.int32, types.int64), codegen


@device_function
def ballot(predicate: bool) -> int:
    """Bit l is set if lane l's predicate holds."""
    return cuda.ballot_sync(_FULL_WARP, predicate)


@device_function
def match_any(value: int) -> int:
    """Lanes, a bit each, whose 32-bit integer is this lane's."""
    return cuda.match_any_sync(_FULL_WARP, value)


@device_function
def sync_warp() -> None:
    """What the lanes wrote to shared memory is seen by all of them."""
    cuda.syncwarp(_FULL_WARP)
