"""The lives of a run's workers: started, ready, dead, started again, given up. Knows no batches.

A worker that dies is started again after a pause that doubles with every death, until it has ended
a batch. One that cannot be started several times in a row is given up, and the others continue.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias

from sensebatch.contract import Stop
from sensebatch.errors import ConfigError, StoppedError, WorkersLostError
from sensebatch.executor.messages import Died, Joined, Order, Ready, Said, Unusable
from sensebatch.jobs import EngineInfo, GroupKey
from sensebatch.plan.patience import PlannedSeconds
from sensebatch.store.writer import RanBy
from sensebatch.units import counted

MAX_FAILED_STARTS = 3
"""Failed starts in a row after which a worker is given up."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before a worker is started again."""
START_PATIENCE_S = 1800.0
"""Seconds that a worker may take to start: to wait for a machine, and to load the weights."""
WAITING_S = 60.0
"""Seconds after which the run says that it waits for workers."""
TICK_S = 0.2
"""Seconds after which a wait for news ends, to look at the clock and at the stop."""

Event: TypeAlias = Said | Callable[[], None]
"""What the executor's thread waits for: news of a worker, or something of its own to do."""


class Crew(Protocol):
    """Starts workers in processes of their own and carries messages: a backend.

    Its methods are called from the executor's thread.
    """

    @property
    def numbers(self) -> Sequence[int]:
        """Numbers of the workers that there is room for at the start."""

    def open(self, events: SimpleQueue[Event]) -> None:
        """Begins; news are put into `events` as `Said`, from any thread."""

    def start(self, worker: int, life: int) -> None:
        """Starts a worker, which says `Ready`, `Unusable` or `Died`."""

    def tell(self, worker: int, order: Order) -> None:
        """Sends an order; nothing comes of it where the worker is dead."""

    def end(self, worker: int) -> None:
        """Ends a worker at once, if it is alive."""

    def close(self) -> None:
        """Ends all workers, and whatever was started for them."""


class Life(StrEnum):
    """What a worker is at."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"
    """To be started again."""
    GIVEN_UP = "given up"


@dataclass(slots=True)
class Member:
    """One worker of a run."""

    number: int
    state: Life = Life.STARTING
    life: int = 0
    """How often it was started."""
    ready: Ready | None = None
    """What it said when it was ready last."""
    info: EngineInfo | None = None
    """Its engine, as it was for its last batch."""
    deaths: int = 0
    """Failed starts or deaths in a row."""
    since: float = 0.0
    """When it was started, or is to be started again."""
    heard: float = 0.0
    """When it said something last."""

    @property
    def name(self) -> str:
        """What people call it."""
        return f"worker {self.number}" + (f" ({self.ready.node})" if self.ready else "")

    @property
    def by(self) -> RanBy:
        """What the log says of it."""
        assert self.ready is not None
        assert self.info is not None
        return RanBy(worker=self.number, node=self.ready.node, info=self.info)


class Roster:
    """The workers of a run.

    Args:
        crew: Starts them.
        note: Takes what a person may want to know.
        clock: Returns monotonic seconds.
        planned: How long batches take by the plan; None where no GPU was measured.
    """

    def __init__(
        self,
        crew: Crew,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        planned: PlannedSeconds | None = None,
    ) -> None:
        self.crew, self.planned = crew, planned
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.members: dict[int, Member] = {}
        self._note = note
        self._clock = clock
        self.changed: Callable[[Member], None] = lambda _: None
        """Called when a worker starts, dies or is given up."""
        self._last_reason = "none was started"
        self._num_unusable = 0
        """Workers that were given up because another try would come to the same."""

    def assemble(self, stop: Stop) -> None:
        """Starts all workers and waits until each is ready or given up.

        Raises:
            StoppedError: The stop was set meanwhile.
            ConfigError: There is no such cluster, or none of the workers can ever be used.
            WorkersLostError: None is left.
        """
        self.crew.open(self.events)
        for number in self.crew.numbers:
            self._start(self._hire(number))
        say_at = self._clock() + WAITING_S
        while any(member.state in (Life.STARTING, Life.DEAD) for member in self.members.values()):
            if self._clock() >= say_at:
                say_at = math.inf
                num_ready = sum(1 for _ in self.ready())
                workers = counted(len(self.members), "worker")
                self._note(f"{num_ready:,} of {workers} ready; waiting for the rest")
            if stop.is_set():
                raise StoppedError("the run was stopped before any of its jobs ran")
            for event in self.wait():
                if isinstance(event, Said):
                    self.hear(event)
                else:
                    event()
            self.tend()
        if self.members and self._num_unusable == len(self.members):
            raise ConfigError(self._last_reason)
        self.require_some()
        devices = sorted({member.info.device for member in self.ready() if member.info})
        if len(devices) > 1:
            self._note(
                f"the workers have different devices ({', '.join(devices)}): an image may differ "
                "in the last bits with the worker that draws it"
            )

    @property
    def words(self) -> str:
        """What is printed about the workers that are ready."""
        ready = [member.ready for member in self.ready() if member.ready is not None]
        nodes = {one.node for one in ready}
        where = next(iter(nodes)) if len(nodes) == 1 else counted(len(nodes), "host")
        devices = sorted({one.info.device for one in ready})
        return f"{counted(len(ready), 'worker')} on {where}: {', '.join(devices)}"

    def ready(self) -> Iterator[Member]:
        """Yields the workers that are at work, by number."""
        for number in sorted(self.members):
            if self.members[number].state is Life.READY:
                yield self.members[number]

    def fitting(self) -> Mapping[GroupKey, int | None]:
        """Returns how many jobs of each group fit the smallest worker."""
        found: dict[GroupKey, int | None] = {}
        for member in self.ready():
            assert member.ready is not None
            for group, jobs in member.ready.fitting.items():
                known = found.get(group)
                both = [number for number in (known, jobs) if number is not None]
                found[group] = min(both, default=None)
        return found

    def wait(self) -> Iterator[Event]:
        """Yields what has happened; waits a moment for the first of it."""
        timeout: float | None = TICK_S
        while True:
            try:
                yield self.events.get(timeout=timeout) if timeout else self.events.get_nowait()
            except Empty:
                return
            timeout = None

    def hear(self, said: Said) -> Member | None:
        """Takes news about a life; returns the worker if it is alive, or has just died.

        News of lives that are over are dropped, and so are starts, which only the roster minds.
        """
        news = said.news
        if isinstance(news, Joined):
            if said.worker not in self.members:
                self._start(self._hire(said.worker))
            return None
        member = self.members[said.worker]
        if said.life != member.life or member.state not in (Life.STARTING, Life.READY):
            return None
        member.heard = self._clock()
        if isinstance(news, Ready):
            member.ready, member.info, member.state = news, news.info, Life.READY
            return member
        if isinstance(news, Unusable):
            self._fail_start(member, news.failure.message, is_final=news.is_final)
            return None
        if isinstance(news, Died):
            return self.lose(member, news.reason)
        return member

    def lose(self, member: Member, reason: str) -> Member | None:
        """Takes the death of a worker; returns it if it was at work."""
        if member.state is Life.STARTING:
            self._fail_start(member, reason, is_final=False)
            return None
        self._note(f"{member.name} died and is started again: {_first_line(reason)}")
        self._rest(member)
        return member

    def refuse(self, member: Member, reason: str) -> None:
        """Gives a worker up for the rest of the run."""
        self.crew.end(member.number)
        member.state = Life.GIVEN_UP
        self.changed(member)
        self._last_reason = _first_line(reason)
        self._note(f"{member.name} is given up: {self._last_reason}")

    def tend(self) -> None:
        """Starts workers whose pause is over, and gives up on starts that take too long."""
        now = self._clock()
        for member in self.members.values():
            if member.state is Life.DEAD and now >= member.since:
                self._start(member)
            elif member.state is Life.STARTING and now >= member.since + START_PATIENCE_S:
                self.refuse(member, f"it was not ready after {START_PATIENCE_S:.0f} s")

    def require_some(self) -> None:
        """Makes sure that there is a worker, or will be one.

        Raises:
            WorkersLostError: All were given up.
        """
        if all(member.state is Life.GIVEN_UP for member in self.members.values()):
            raise WorkersLostError(f"no worker is left: {self._last_reason}")

    def _hire(self, number: int) -> Member:
        self.members[number] = Member(number)
        return self.members[number]

    def _start(self, member: Member) -> None:
        member.life += 1
        member.state, member.since = Life.STARTING, self._clock()
        self.changed(member)
        self.crew.start(member.number, member.life)

    def _fail_start(self, member: Member, reason: str, *, is_final: bool) -> None:
        self._num_unusable += is_final
        if is_final or member.deaths + 1 >= MAX_FAILED_STARTS:
            self.refuse(member, reason)
        else:
            self._rest(member)

    def _rest(self, member: Member) -> None:
        """Lets a worker wait until it is started again."""
        self.crew.end(member.number)
        pause_s = min(FIRST_PAUSE_S * 2 ** min(member.deaths, 10), LONGEST_PAUSE_S)
        member.deaths += 1
        member.state, member.since = Life.DEAD, self._clock() + pause_s
        self.changed(member)


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0].strip() if lines else "no reason is known"
