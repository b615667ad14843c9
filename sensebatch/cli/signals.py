"""Handles SIGINT, SIGTERM and SIGHUP: the first one stops a run, the second one ends it at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

FINISHING = "stopping after the current images; again to stop at once"
"""Printed after the first signal, once jobs are running."""
LEAVING = "stopping; again to stop at once"
"""Printed after the first signal before that."""
RESUMABLE = "stopped at once; the same command resumes the run"
"""Printed after the second signal."""

_SHOW_CURSOR = b"\x1b[?25h"


class Interrupt(KeyboardInterrupt):
    """Ends what a command does before a run.

    It has a type of its own because Python kills its process with SIGINT, whatever the exit code,
    once a plain KeyboardInterrupt has passed through `exec` of a string, which imports often use.
    """


class StopSignals:
    """Whether a run was asked to stop; the `Stop` of the executor.

    Python calls a signal's handler between two of its own instructions, once, however many signals
    arrived in the meantime. Two signals during one long call would count as one, so each signal
    also writes a byte to a socket, and a thread counts the bytes.

    Args:
        ended: Printed after the second signal.
    """

    def __init__(self, ended: str = RESUMABLE) -> None:
        self.notice = True
        """Whether the first signal prints a line; False if a display shows it."""
        self._ended = ended
        self._stop = threading.Event()
        self._numbers: tuple[int, ...] = ()
        self._is_installed = False
        self._forking = threading.local()
        self._interrupts = False
        self._finishes = True
        self._num_handled = 0
        self._speaking = threading.RLock()

    def is_set(self) -> bool:
        """Returns whether a first signal has arrived."""
        return self._stop.is_set()

    def finish_images(self) -> None:
        """From now on, lets the run finish its current images after a first signal."""
        self._interrupts, self._finishes = False, True

    @contextmanager
    def installed(self, *, interrupts: bool = False) -> Iterator[StopSignals]:
        """Handles the signals during the block, which must run in the main thread.

        Args:
            interrupts: Whether the first signal raises `Interrupt` in the main thread, as long as
                `finish_images` has not been called.
        """
        self._interrupts, self._finishes = interrupts, not interrupts
        self._numbers = handled_signals()
        arrived, arriving = socket.socketpair()
        arriving.setblocking(False)
        wakeup = signal.set_wakeup_fd(arriving.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._handle) for number in self._numbers}
        self._is_installed = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._fork, after_in_parent=self._forked, after_in_child=self._in_child
            )
        counter = threading.Thread(target=self._count, args=(arrived,), daemon=True)
        counter.start()
        try:
            yield self
        finally:
            self._is_installed = False
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            # To close it would not end the thread while a process that was forked has it open too.
            arriving.shutdown(socket.SHUT_RDWR)
            arriving.close()
            counter.join()
            arrived.close()

    def _fork(self) -> None:
        """Holds signals back while a thread, of a function that judges, forks its process."""
        if self._is_installed:
            self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)

    def _forked(self) -> None:
        mask = self._forking.__dict__.pop("mask", None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _in_child(self) -> None:
        """Has signals to a process that was forked end it; here they would be counted as the run's.

        A terminal sends SIGINT to all, and the run says when it is over.
        """
        if self._is_installed:
            self._is_installed = False
            signal.set_wakeup_fd(-1)
            for number in self._numbers:
                is_interrupt = number == signal.SIGINT
                signal.signal(number, (lambda *_: None) if is_interrupt else signal.SIG_DFL)
        self._forked()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._num_handled += 1
        if self._num_handled > 1:
            self._end(number)
        self._stop.set()
        if self._interrupts:
            self._interrupts = False
            raise Interrupt

    def _count(self, arrived: socket.socket) -> None:
        """Counts the signals that arrive, until the other end of the socket is closed."""
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        num_arrived = 0
        while numbers := arrived.recv(64):
            for number in numbers:
                if number not in self._numbers:
                    continue
                num_arrived += 1
                if num_arrived > 1:
                    self._end(number)
                self._stop.set()
                # Never after the last line, which the main thread may be printing.
                with self._speaking:
                    if self.notice:
                        _tell(FINISHING if self._finishes else LEAVING)

    def _end(self, number: int) -> NoReturn:
        with self._speaking:
            _tell(self._ended, show_cursor=True)
            # Waiting for threads and buffers would take time, and nothing is lost without it: what
            # matters is on the disk, as after a kill.
            os._exit(128 + number)


def handled_signals() -> tuple[int, ...]:
    """Returns the signals that stop a run: SIGINT, SIGTERM and, unless ignored, SIGHUP."""
    numbers = [int(signal.SIGINT), int(signal.SIGTERM)]
    # nohup has it ignored, and it must stay so.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(int(signal.SIGHUP))
    return tuple(numbers)


def _tell(text: str, *, show_cursor: bool = False) -> None:
    """Writes a line to standard error if it is open; nothing fails if nobody reads it."""
    # A plain write, because the main thread may be in the middle of a print.
    if sys.stderr is not None:
        with suppress(OSError):
            cursor = _SHOW_CURSOR if show_cursor and sys.stderr.isatty() else b""
            os.write(2, cursor + f"\n{text}\n".encode())
