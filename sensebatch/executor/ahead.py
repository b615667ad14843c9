"""Has an engine read the prompts of the next assignment while it draws the one before.

What is read ahead is spare work: it is dropped rather than let it harm the batch that is drawn,
and its own batch then reads its prompts itself. So a job whose prompt cannot be read fails where it
would have failed anyway. Never sees torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sensebatch.contract import (
    Channel,
    Drawn,
    Engine,
    Phase,
    Prepared,
    Progress,
    Raised,
    Reading,
)
from sensebatch.executor.guard import guarded


class Ahead:
    """What an engine reads ahead: of one assignment at a time, and never of one twice.

    Args:
        engine: Reads; all calls but `expect` and `forget` are made by the thread that generates.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._expected: dict[int, Sequence[Prepared]] = {}
        """What was prepared of assignments that are still to come and have not been read ahead."""
        self._held: tuple[int, Reading] | None = None
        self._is_off = False

    def expect(self, number: int, prepared: Sequence[Prepared]) -> None:
        """Takes an assignment that is prepared whole, and comes after those taken before."""
        if prepared:
            self._expected[number] = prepared

    def forget(self, number: int) -> None:
        """Drops what was read of an assignment."""
        self._expected.pop(number, None)
        # Read once, since the thread that generates may take it meanwhile.
        held = self._held
        if held is not None and held[0] == number:
            self._held = None

    def take(self, number: int) -> Reading | None:
        """Returns what was read of an assignment that is to be run now; drops anything else."""
        held, self._held = self._held, None
        self._expected.pop(number, None)
        return held[1] if held is not None and held[0] == number else None

    def drop(self) -> bool:
        """Frees what was read, and reads nothing from then on; returns whether there was any."""
        held, self._held = self._held, None
        self._is_off = self._is_off or held is not None
        return held is not None

    def beside(self, channel: Channel) -> Channel:
        """Returns a batch's channel with which the next assignment is read between two steps."""
        return _Beside(channel, self._read_on)

    def _read_on(self, progress: Progress) -> None:
        held = self._held or self._begun()
        if held is None:
            return
        number, reading = held
        calls = progress.num_steps - progress.step
        if isinstance(guarded(partial(reading.advance, calls)), Raised):
            self.forget(number)

    def _begun(self) -> tuple[int, Reading] | None:
        """Begins to read what comes next; returns None if nothing is to be read."""
        if self._is_off:
            return None
        for number in list(self._expected):
            # Another thread may have dropped it meanwhile.
            prepared = self._expected.pop(number, None)
            if prepared is None:
                continue
            reading = guarded(partial(self._engine.read, prepared))
            if reading is None or isinstance(reading, Raised):
                return None
            self._held = (number, reading)
            return self._held
        return None


class _Beside(Channel):
    """Hands everything on, and reads on after each step of drawing."""

    def __init__(self, channel: Channel, read_on: Callable[[Progress], None]) -> None:
        self._channel = channel
        self._read_on = read_on

    def progress(self, progress: Progress) -> None:
        """Hands it on, and reads on unless the run is to stop."""
        self._channel.progress(progress)
        if progress.phase is Phase.DENOISE and not self._channel.is_stopped():
            self._read_on(progress)

    def keep(self, drawn: Drawn) -> None:
        """Hands it on."""
        self._channel.keep(drawn)

    def is_stopped(self) -> bool:
        """Hands it on."""
        return self._channel.is_stopped()

    def observe(self, step: int, velocities: Any) -> None:
        """Hands it on."""
        self._channel.observe(step, velocities)
