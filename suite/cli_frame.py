"""Frame around the command line: one line per error, exit codes, signals, ``--debug`` anywhere."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import typer

from suite.errors import InputError, shown

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_USAGE_ERROR: type[BaseException] = typer.BadParameter.__mro__[1]  # click's, wherever typer keeps click


def guarded(app: typer.Typer, argv: list[str] | None) -> int:
    """Run an app; an error is one line on stderr, with ``--debug`` a traceback.

    Returns
    -------
    int : 0 done, 1 failed, 2 bad input, 130 interrupted
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if wrong := [a for a in arguments if any("\ud800" <= c <= "\udfff" for c in a)]:
        return _one_line(InputError(f"argument {shown(wrong[0])} is not UTF-8 text; rename the file or type it again"))
    command = typer.main.get_command(app)
    try:
        with _terminate_as_interrupt():
            code = command.main(
                [a for a in arguments if a != "--debug"], prog_name="countdown-suite", standalone_mode=False
            )
    except (KeyboardInterrupt, typer.Abort):  # newer typer returns 130 instead
        code = INTERRUPTED
    except Exception as error:  # the outermost frame: whatever it is, one line and an exit code
        if debug:
            raise
        return _one_line(error)
    if code == INTERRUPTED:
        typer.echo("interrupted: run the same command again to go on where it stopped", err=True)
    return int(code or OK)


def _one_line(error: Exception) -> int:
    from suite.runs.store import StoreFullError

    message = _shortened(" ".join(str(error).split()))
    if isinstance(error, _USAGE_ERROR):
        message = _shortened(" ".join(error.format_message().split())) if hasattr(error, "format_message") else message
        if message:  # no_args_is_help has printed the help already
            typer.echo(f"error: {message} (countdown-suite --help)", err=True)
        return BAD_INPUT
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # wherever a path comes in
        message = f"{shown(error.filename)}: {error.strerror}; give a shorter path"
        error = InputError(message)
    if isinstance(error, InputError):
        typer.echo(f"error: {message}", err=True)
        return BAD_INPUT
    if isinstance(error, StoreFullError):
        typer.echo(f"error: {message}", err=True)
        return FAILED
    typer.echo(f"error: {type(error).__name__}: {message} (--debug shows where)", err=True)
    return FAILED


def _shortened(message: str) -> str:
    """The message with the middle of a word that fills the screen left out: a value or path may have any length."""
    return re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}[...]{word[0][-100:]}", message)


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM stop a run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
