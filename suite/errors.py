"""Errors that a user sees as one line."""


class InputError(ValueError):
    """Bad configuration or input; the message is one line with value, place and remedy (CLI exit 2)."""


class CellError(RuntimeError):
    """The work of one cell failed; the cell is recorded as failed and the run goes on (CLI exit 1)."""
