"""The one place that catches everything: what a call returned, or what it raised, as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

from sensebatch import errors
from sensebatch.contract import Concerns, Raised
from sensebatch.errors import OutOfMemoryError, RunFolderError, RunStoppedError
from sensebatch.jobs import Failure

T = TypeVar("T")

_OF_THE_RUN = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, RunStoppedError | RunFolderError)
}


def guarded(call: Callable[[], T], catching: type[BaseException] = Exception) -> T | Raised:
    """Returns what `call` returns, or what it raised.

    Args:
        call: Is called once.
        catching: What is returned and not let through. Signals raise in the main thread alone, so
            whoever waits for another thread has it return whatever is raised there.
    """
    try:
        return call()
    except catching as error:
        return Raised(failure=Failure.of(error), concerns=_concerns(error))


def _concerns(error: BaseException) -> Concerns:
    if isinstance(error, RunStoppedError | RunFolderError):
        return Concerns.RUN
    return Concerns.MEMORY if isinstance(error, OutOfMemoryError) else Concerns.JOBS


def raise_again(raised: Raised) -> NoReturn:
    """Raises what concerns the run, as it was raised where it happened."""
    raise _OF_THE_RUN.get(raised.failure.type, RunStoppedError)(raised.failure.message)
