"""What is said to people beside a command's result: always on stderr."""

from __future__ import annotations

import sys
from contextlib import suppress

from sensebatch.errors import Problem


def say(text: str) -> None:
    """Prints a line for people; where they are gone, with their terminal, work goes on."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun: `1 job`, `2,000 jobs`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def warn(text: str) -> None:
    """Prints something that deserves a look."""
    say(f"warning: {text}")


def warn_of(problem: Problem) -> None:
    """Prints what is allowed in a manifest but deserves a look."""
    warn(str(problem))
