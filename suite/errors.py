"""Errors that a user sees as one line."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad configuration or input; the message is one line with value, place and remedy (CLI exit 2)."""


class CellError(RuntimeError):
    """The work of one cell failed; the cell is recorded as failed and the run goes on (CLI exit 1)."""


@contextlib.contextmanager
def named(place: str) -> Iterator[None]:
    """Put the place, such as ``accuracy.0.methods``, before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
