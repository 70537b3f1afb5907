"""Inline PTX for Numba: LLVM types, one-instruction device functions, tuples as lists of LLVM values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_LTYPE = {types.int32: I32, types.int64: I64, types.float32: F32}
_LETTER = {types.int32: "r", types.int64: "l", types.float32: "f"}


def asm(builder: Any, result: Any, text: str, constraints: str, args: Sequence[Any], *, pure: bool = False) -> Any:
    """Call of inline PTX; ``pure``: the compiler may move, share or drop it."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.asm(kind, text, constraints, args, side_effect=not pure)


def shared_address(builder: Any, address: Any) -> Any:
    """The 32 bits that PTX takes as an address of shared memory."""
    return builder.trunc(address, I32)


def instruction(
    text: str, result: Any, *arguments: Any, shared: bool = False, pure: bool = False
) -> Callable[..., Any]:
    """Device function that is one PTX instruction; ``shared``: the first argument is a shared address (32 bits)."""
    none = result is types.void

    def typer(_context: Any, *given: Any) -> Any:
        letters = [_LETTER[a] for a in arguments]
        if shared:
            letters[0] = "r"
        constraints = ",".join(([] if none else ["=" + _LETTER[result]]) + letters)

        def codegen(_ctx: Any, builder: Any, _sig: Any, values: Any) -> Any:
            values = list(values)
            if shared:
                values[0] = shared_address(builder, values[0])
            made = asm(builder, ir.VoidType() if none else _LTYPE[result], text, constraints, values, pure=pure)
            return cgutils.get_null_value(ir.IntType(8).as_pointer()) if none else made

        return result(*arguments), codegen

    # numba reads the arity from the signature
    names = ", ".join(f"a{i}" for i in range(len(arguments)))
    scope: dict[str, Any] = {"typer": typer}
    exec(f"def op(context{', ' if names else ''}{names}): return typer(context{', ' if names else ''}{names})", scope)
    return intrinsic(scope["op"])


def unpack(builder: Any, values: Any, n: int) -> list[Any]:
    """First ``n`` elements of a tuple."""
    return [builder.extract_value(values, i) for i in range(n)]


def pack(context: Any, builder: Any, kind: Any, values: Sequence[Any]) -> Any:
    """Tuple of Numba type ``kind``."""
    return context.make_tuple(builder, kind, values)


def offset(builder: Any, address: Any, by: int) -> Any:
    """``address`` plus a constant number of bytes."""
    return builder.add(address, I64(by)) if by else address
