"""Prints what happens during a run: as much as was asked for on stderr, and all in its log file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import TextIO

from sensebatch.cli.messages import say
from sensebatch.errors import Problem

_PACKAGE = "sensebatch"


class Level(IntEnum):
    """How important a line is."""

    DETAIL = 0
    """Printed with `--verbose`."""
    INFO = 1
    """The progress of a run."""
    BRIEF = 2
    """What a command that runs one job prints about it."""
    ALERT = 3
    """Warnings and failures, which `--quiet` prints as well."""


Printer = Callable[[str, Level], None]


class Voice:
    """Prints lines from a level on, and writes those about a run to the run's log file.

    Args:
        least: The lowest level that is printed.
        now: Returns the time, with its zone.
    """

    def __init__(
        self,
        least: Level = Level.INFO,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self.least = least
        self.printer: Printer = lambda text, _: say(text)
        """Prints a line; replaced by a display while there is one."""
        self.timed = False
        """Whether printed lines begin with the time of day."""
        self._now = now
        self._early: list[str] | None = []
        """Lines from before the log file was opened; None once that was tried."""
        self._file: TextIO | None = None

    def tell(self, level: Level, text: str) -> None:
        """Prints a line if its level is high enough, and writes it to the log file."""
        if level >= self.least:
            clock = f"{self._now():%H:%M:%S} " if self.timed else ""
            self.printer(f"{clock}{text}", level)
        if level >= min(self.least, Level.INFO):
            self.record(text)

    def record(self, text: str) -> None:
        """Writes a line to the log file only."""
        line = f"{self._now().isoformat(' ', 'seconds')} {text}\n"
        if self._file is not None:
            # A run does not end because its messages cannot be written.
            with suppress(OSError):
                self._file.write(line)
        elif self._early is not None:
            self._early.append(line)

    def detail(self, text: str) -> None:
        """Prints a line of detail."""
        self.tell(Level.DETAIL, text)

    def info(self, text: str) -> None:
        """Prints a line about the progress of a run."""
        self.tell(Level.INFO, text)

    def alert(self, text: str) -> None:
        """Prints a line about something that went wrong."""
        self.tell(Level.ALERT, text)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.alert(f"warning: {text}")

    def warn_of(self, problem: Problem) -> None:
        """Prints a warning about a manifest."""
        self.warn(str(problem))

    def keep(self, path: Path) -> None:
        """Appends all lines so far, and all that follow, to a log file."""
        early, self._early = self._early, None
        self.close()
        with suppress(OSError):
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._file.writelines(early or ())

    def close(self) -> None:
        """Closes the log file."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Prints what libraries and the package log during the block, from warnings on.

        With `--verbose`, the package logs more.
        """
        handler, package = _Handler(self), logging.getLogger(_PACKAGE)
        before, root = package.level, logging.getLogger()
        package.setLevel(logging.DEBUG if self.least is Level.DETAIL else logging.WARNING)
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            package.setLevel(before)


class _Handler(logging.Handler):
    """Passes log records to a voice."""

    def __init__(self, voice: Voice) -> None:
        super().__init__()
        self._voice = voice

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._voice.warn(text)
        else:
            self._voice.detail(text)
