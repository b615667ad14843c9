"""The one place that catches everything: what a call gave, or what it raised, as text.

What concerns the whole run is let through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sensebatch.errors import OutOfMemoryError, RunFolderError, RunStoppedError
from sensebatch.store.attempts import Failure

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An exception that concerns jobs, as text."""

    failure: Failure
    out_of_memory: bool


def guarded(call: Callable[[], T]) -> T | Raised:
    """Returns what `call` returns, or what it raised.

    Raises:
        RunStoppedError: As `call` did: no other job would fare better.
        RunFolderError: Likewise.
    """
    try:
        return call()
    except (RunStoppedError, RunFolderError):
        raise
    except Exception as error:
        return Raised(failure=Failure.of(error), out_of_memory=isinstance(error, OutOfMemoryError))
