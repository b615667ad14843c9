"""Keeps a run's own handling of signals while Ray is started, which has another idea of SIGTERM.

Ray's handler prints where the process is, plans an abort three seconds later by a timer and
SIGALRM, and calls the handler that was there before. It comes while Ray holds the interpreter, for
seconds on a busy machine. So SIGALRM waits, and the abort is called off as soon as anybody can.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext


def leave_to_main_thread() -> None:
    """Keeps signals from the thread that starts Ray, and from all that it starts.

    What a terminal sends to all its processes is for the run alone to heed.
    """
    signals = {signal.SIGINT, signal.SIGHUP, signal.SIGALRM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)


@contextmanager
def own_sigterm() -> Iterator[Callable[[], None]]:
    """Has SIGTERM handled as before at the end of the block, and whenever its value is called.

    Does nothing in other threads than the main one, and calls nothing off where the process has a
    timer of its own.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield lambda: None
        return

    def take_back() -> None:
        signal.signal(signal.SIGTERM, handler)

    has_timer = any(signal.getitimer(signal.ITIMER_REAL))
    with nullcontext() if has_timer else _without_abort():
        try:
            yield take_back
        finally:
            take_back()


@contextmanager
def _without_abort() -> Iterator[None]:
    """Lets SIGALRM wait, and calls off at the end what sends it."""
    handler = signal.getsignal(signal.SIGALRM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        yield
    finally:
        signal.alarm(0)
        if signal.SIGALRM in signal.sigpending():
            signal.sigwait({signal.SIGALRM})
        if handler is not None:
            signal.signal(signal.SIGALRM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
