"""Starts the command line, as `sensebatch` and as `python -m sensebatch`."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
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
    """Opens standard streams that are closed, to the null device.

    Otherwise the next file that is opened would get the number of standard error, and libraries
    that write there would write into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one, is used.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _end_quietly_by_signals() -> None:
    """Has a signal that arrives before a run begins end the process with the documented code."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    # A second signal does not wait for the clean-up that the first one starts.
    signal.signal(number, lambda *_: os._exit(128 + number))
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
