"""Bounds on what a call may take, whatever else the machine is doing."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

CPU_S = 5
"""Seconds of computing, not of waiting: a loaded machine changes nothing."""
MEMORY_BYTES = 2**30
"""Address space that may be taken on top."""


class TooLongError(AssertionError):
    """A call computed for longer than it may."""


@contextmanager
def bounded(cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Fails a block that computes for too long or takes too much memory."""

    def end(_: int, __: FrameType | None) -> None:
        raise TooLongError(f"more than {cpu_s} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, end)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.exists():
        now = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory_bytes, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
