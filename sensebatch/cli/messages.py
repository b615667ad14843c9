"""Prints: the result of a command on stdout, and messages for people on stderr."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from sensebatch.errors import Problem


class OutputError(Exception):
    """Standard output cannot be written."""


def show(text: str) -> None:
    """Prints the result of a command, or a line of it, on stdout.

    Raises:
        OutputError: It cannot be written; what follows is dropped.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # Otherwise the interpreter would try to write the rest when it exits.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise OutputError("") from None
        raise OutputError(f"stdout: {error.strerror}") from None


def show_anyway(text: str) -> None:
    """Prints on stdout; a failure is only a warning, because the exit code is about the jobs."""
    try:
        show(text)
    except OutputError as error:
        if str(error):
            warn(str(error))


def say(text: str) -> None:
    """Prints a line for people; if nobody reads it any more, the work continues."""
    # Without standard error, print would use standard output.
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun: `1 job`, `2,000 jobs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def warn(text: str) -> None:
    """Prints a warning."""
    say(f"warning: {text}")


def warn_of(problem: Problem) -> None:
    """Prints a warning about a manifest."""
    warn(str(problem))
