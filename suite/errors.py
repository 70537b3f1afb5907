"""Errors that a user sees as one line."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad configuration or input; the message is one line with value, place and remedy (CLI exit 2)."""


class CellInputError(InputError):
    """A task or model that cannot be prepared: in a run its cells are recorded as failed and the others go on."""


class CellError(RuntimeError):
    """The work of one cell failed; the cell is recorded as failed and the run goes on (CLI exit 1)."""


@contextlib.contextmanager
def named(place: str) -> Iterator[None]:
    """Put the place, such as ``accuracy.0.methods``, before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def shown(value: object, most: int = 80, *, quotes: bool = True) -> str:
    """Value for a message: as Python writes it (a text without ``quotes`` as it is), cut where it is long."""
    try:
        text = repr(value) if quotes else str(value)
    except ValueError:  # Python refuses to write a whole number of 5000 digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
