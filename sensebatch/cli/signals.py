"""What SIGINT and SIGTERM do to a run: the first asks it to stop, the second ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPING = "stopping once the work in hand is finished; again to stop at once"
"""What a person is told after the first signal."""
RESUMABLE = "stopped at once; the same command goes on from here"
"""What a person is told after the second."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = f"\n{STOPPING}\n".encode()
_SHOW_CURSOR = b"\x1b[?25h"


class StopSignals:
    """Whether a run was asked to stop; a run's `Stop` for the executor.

    Args:
        ended: What a person is told after the second signal.
    """

    def __init__(self, ended: str = RESUMABLE) -> None:
        self._ended = f"\n{ended}\n".encode()
        self._stop = threading.Event()
        self.notice = True
        """Whether the first signal prints a line; a display shows it otherwise."""

    def is_set(self) -> bool:
        """Returns whether a first signal came."""
        return self._stop.is_set()

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Handles the signals while the block runs."""
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        # Plain writes: the signal may have come in the middle of a print.
        if self._stop.is_set():
            _tell(self._ended, show_cursor=True)
            # Waiting for threads and buffers would not be at once, and nothing is lost: what
            # counts is on the disk, as after a kill.
            os._exit(128 + number)
        self._stop.set()
        if self.notice:
            _tell(_NOTICE)


def _tell(text: bytes, *, show_cursor: bool = False) -> None:
    """Writes to standard error, if there is one; who read it may be gone, which stops nothing."""
    # Without standard error its number may be that of another file.
    if sys.stderr is not None:
        with suppress(OSError):
            os.write(2, (_SHOW_CURSOR if show_cursor and sys.stderr.isatty() else b"") + text)
