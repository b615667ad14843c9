"""A run on the command line: the library's session with signals and a display around it."""

from __future__ import annotations

import os
import sys

from sensebatch import session
from sensebatch.cli.progress import watch
from sensebatch.cli.signals import Interrupt, StopSignals
from sensebatch.cli.voice import Voice
from sensebatch.errors import StoppedError
from sensebatch.executor.observer import Summary
from sensebatch.session import Request


def run_session(request: Request, voice: Voice) -> Summary:
    """Runs what is missing in a run's folder, shows its progress, and returns what became of it.

    Args:
        request: What to run.
        voice: Prints how the run goes.

    Raises:
        SensebatchError: As `session.run_session` raises it.
    """
    _settle_allocator()
    stop = StopSignals()
    try:
        with stop.installed(interrupts=True), voice.logging(), watch(stop, voice) as display:
            voice.info(f"reading {', '.join(request.sources)}")
            return session.run_session(request, observer=display, stop=stop)
    except Interrupt:
        raise StoppedError("a signal came before any job was run") from None


def _settle_allocator() -> None:
    """Lets torch's allocator grow its segments in place; it reads this setting on first use.

    Otherwise it keeps freed segments of sizes that no later tensor has, so less fits a budget. A
    setting of the user's own is left alone.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
