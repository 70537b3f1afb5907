"""Checks that CPU and CUDA layers share: one ValueError of one line that names the value."""

from __future__ import annotations

import math
from numbers import Real


def checked_threshold(value: object) -> float:
    """A threshold as a float; ValueError unless it is a number (no text, no bool) other than NaN."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"threshold={value!r} is a {type(value).__name__}: pass a float, -inf to keep all neurons")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError("threshold is an integer too large for a float: pass inf to drop all finite scores") from None
    if math.isnan(number):
        raise ValueError("threshold is NaN: fit it, or pass -inf to keep all neurons")
    return number


def check_apart(out: tuple[int, int], other: tuple[int, int], name: str) -> None:
    """ValueError if ``out`` overlaps another buffer without being that buffer; each is its address and size in bytes.

    In place is right, since a token is read before its output is written; shifted, it would destroy the next token.
    """
    (start, size), (begin, length) = out, other
    if (start, size) != (begin, length) and start < begin + length and begin < start + size:
        raise ValueError(f"out overlaps {name} from another address on: pass {name} itself, or memory of its own")
