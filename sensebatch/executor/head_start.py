"""Lets threads in the background wait for the moment in which the next batch begins."""

from __future__ import annotations

import threading
import time

HEAD_START_S = 0.25
"""Longest wait: a batch has begun by then, or it does not depend on a moment."""


class HeadStart:
    """A moment that one thread has the interpreter to itself.

    Between two batches the device has nothing to do until the first step of the next one is
    launched, which takes a few milliseconds. Threads that encode the images of the batch before
    would want the interpreter at that very moment, and make it several times as long.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._over.set()
        self._end = 0.0

    def begin(self) -> None:
        """Has threads that come to `wait` stay there."""
        self._end = time.monotonic() + HEAD_START_S
        self._over.clear()

    def end(self) -> None:
        """Lets them continue."""
        self._over.set()

    def wait(self) -> None:
        """Returns once the moment is over; at once if there is none."""
        if not self._over.is_set():
            self._over.wait(max(self._end - time.monotonic(), 0))
