"""Starts the command line, as `sensebatch` and as `python -m sensebatch`."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Runs the process's command line.

    Raises:
        SystemExit: Always, with the exit code.
    """
    _fill_standard_streams()
    _end_quietly_by_signals()
    from sensebatch.cli.main import main as run

    run()


def _fill_standard_streams() -> None:
    """Gives the numbers of standard streams that are closed to nothing.

    Otherwise the next file that is opened gets the number of standard error, and every library
    that writes there writes into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Opens the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _end_quietly_by_signals() -> None:
    """Ends the process with the documented exit code by a signal that comes before a run begins."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    # The second one does not wait for what the first one has cleaned up.
    signal.signal(number, lambda *_: os._exit(128 + number))
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
