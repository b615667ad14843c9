"""What runs next: which jobs together, and in which order. Pure: ids in, ids out.

The order is: batches on record as they were recorded, then the plan group by group, then what is
to come last. What an assignment was split into comes right after it. Jobs to be tried again wait
for the end of the group that is being handed out and then run alone. Knows no store, engine or
clock, and not how many workers there are: any number of assignments may be in flight.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

Recorded: TypeAlias = tuple[int, tuple[str, ...]]
"""A batch on record: its number in the state and the ids of its jobs."""
Groups: TypeAlias = Iterable[Iterable[tuple[str, ...]]]
"""The batches of each group, by the ids of their jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Jobs that are handed out to run together, once."""

    number: int
    """Its own in the schedule."""
    ids: tuple[str, ...]
    seq: int | None = None
    """Number of the batch on record; None where the composition is still to be recorded."""
    is_retry: bool = False
    """Whether it is one job that failed before in this run."""
    is_last: bool = False
    """Whether it is one that nothing else may be in flight with."""


class Idle(Enum):
    """Why the schedule hands out nothing."""

    WAITING = "waiting"
    """What is in flight has to end first, and may bring more."""
    FINISHED = "finished"
    """Everything is done."""


class _Lane:
    """Batches that follow each other: a part is read when all before it is through.

    Args:
        later: The parts, each the batches of some groups; read one by one.
    """

    def __init__(self, later: Iterator[Groups]) -> None:
        self.part = 0
        """How many parts were read."""
        self.in_flight: set[int] = set()
        """Numbers of its assignments in flight."""
        self.held: set[int] = set()
        """Those that the end of a group waits for."""
        self.split: deque[Assignment] = deque()
        self.retries: deque[Assignment] = deque()
        self._later = later
        self._planned: Iterator[tuple[int, Assignment]] = iter(())
        self._head: tuple[int, Assignment] | None = None
        self._after: deque[tuple[int, Assignment]] = deque()
        """What was planned after it, as far as somebody looked."""
        self._section = 0
        """Section of the planned assignment that was handed out last: the batches on record,
        each group, and each of those that come last, are one."""

    def plan(self, planned: Iterator[tuple[int, Assignment]]) -> None:
        """Takes assignments, each with its section, in the place of those that are through."""
        self._planned = planned
        self._head = next(planned, None)

    def read(self) -> Groups | None:
        """Returns the groups of the next part; None if there is none, or not yet."""
        if self.in_flight or self.expected is not None:
            return None
        found = next(self._later, None)
        self.part += found is not None
        return found

    @property
    def expected(self) -> Assignment | None:
        """What comes next; None if that depends on what is in flight."""
        if self.split:
            return self.split[0]
        if self.retries and self._is_at_end_of_group:
            return self.retries[0]
        return None if self._head is None else self._head[1]

    def upcoming(self, count: int) -> list[Assignment]:
        """Returns what comes next if nothing in flight fails, up to the end of a group."""
        found = list(itertools.islice(self.split, count))
        if self._head is None:
            return found
        while len(self._after) < count - len(found) and (one := next(self._planned, None)):
            self._after.append(one)
        of_group = (one for part, one in (self._head, *self._after) if part == self._section)
        return [*found, *itertools.islice(of_group, count - len(found))]

    @property
    def must_wait(self) -> bool:
        """Whether something in flight has to end before what comes next."""
        return bool(self.held) and not self.split and self._is_at_end_of_group

    def take(self) -> Assignment:
        """Hands out what comes next."""
        if self.split:
            found = self.split.popleft()
        elif self.retries and self._is_at_end_of_group:
            found = self.retries.popleft()
        else:
            assert self._head is not None
            self._section, found = self._head
            self._head = self._after.popleft() if self._after else next(self._planned, None)
        self.in_flight.add(found.number)
        return found

    @property
    def _is_at_end_of_group(self) -> bool:
        """Whether what is handed out now belongs to another section than what was before."""
        return self._head is None or self._head[0] != self._section


class Schedule:
    """Hands out every job until it is done or given up, never twice at a time.

    Args:
        recorded: Batches that are on record as started; they come first.
        groups: The batches of each group of the plan; read as they are needed.
        last: Batches on record that come after all others, each with nothing else in flight.
        later: What follows when all of these are through: lanes of parts. A part is read when
            those before it in its lane are through, since it may depend on what became of them;
            what is in flight of other lanes does not matter. Of several lanes, the one that is the
            least far comes first.
    """

    def __init__(
        self,
        *,
        recorded: Iterable[Recorded] = (),
        groups: Groups = (),
        last: Iterable[Recorded] = (),
        later: Iterable[Iterator[Groups]] = (),
    ) -> None:
        self._later = [_Lane(parts) for parts in later]
        self._sections = itertools.count()
        self._numbers = itertools.count(1)
        self._in_flight: dict[int, tuple[Assignment, _Lane]] = {}
        first = _Lane(iter(()))
        first.plan(self._plan(recorded, groups, last))
        self._lanes = [first]

    def next(self) -> Assignment | Idle:
        """Hands out what comes next, which is in flight until `done` or `split`."""
        lane = self._first_lane()
        if lane is None:
            return Idle.WAITING if self._in_flight else Idle.FINISHED
        if self._must_wait(lane):
            return Idle.WAITING
        found = lane.take()
        self._in_flight[found.number] = (found, lane)
        return found

    def peek(self) -> Assignment | None:
        """Returns what `next` hands out if nothing in flight ends; None if that is nothing."""
        lane = self._first_lane()
        return None if lane is None else lane.expected

    def upcoming(self, assignment: Assignment, count: int) -> list[Assignment]:
        """Returns what comes after an assignment in flight, if nothing fails, up to the end of its
        group."""
        return self._in_flight[assignment.number][1].upcoming(count)

    def split(self, assignment: Assignment, parts: Iterable[Recorded]) -> None:
        """Replaces an assignment in flight by smaller ones, which come next."""
        _, lane = self._in_flight[assignment.number]
        self.done(assignment)
        lane.split.extend(self._new(ids, seq=seq) for seq, ids in parts)

    def retry(self, job_id: str) -> None:
        """Queues a job that failed to run alone at the end of the group.

        The job must no longer be running; the assignment that it was in may be in flight.
        """
        of_job = (lane for one, lane in self._in_flight.values() if job_id in one.ids)
        lane = next(of_job, self._lanes[0])
        lane.retries.append(self._new((job_id,), is_retry=True))

    def hold(self, assignment: Assignment) -> None:
        """Lets the end of the group wait for an assignment in flight, which may bring retries."""
        self._in_flight[assignment.number][1].held.add(assignment.number)

    def done(self, assignment: Assignment) -> None:
        """Ends an assignment in flight: each of its jobs is done, given up, or to be retried."""
        _, lane = self._in_flight.pop(assignment.number)
        lane.in_flight.discard(assignment.number)
        lane.held.discard(assignment.number)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is in flight and nothing is left to be handed out."""
        return not self._in_flight and self.peek() is None

    def _first_lane(self) -> _Lane | None:
        """Returns the lane whose turn it is; None if no lane has anything now."""
        self._go_on()
        ready = [lane for lane in self._lanes if lane.expected is not None]
        # What was split comes first, then what nothing has to end before.
        return min(
            ready,
            key=lambda lane: (not lane.split, self._must_wait(lane), lane.part),
            default=None,
        )

    def _go_on(self) -> None:
        """Reads parts of lanes once everything before them is through."""
        if self._later and not self._in_flight and self._lanes[0].expected is None:
            self._lanes, self._later = self._later, []
        for lane in self._lanes:
            while (groups := lane.read()) is not None:
                lane.plan(self._plan((), groups, ()))

    def _must_wait(self, lane: _Lane) -> bool:
        """Whether something in flight has to end before a lane hands out anything."""
        if lane.expected is not None and lane.expected.is_last:
            return bool(self._in_flight)
        return lane.must_wait

    def _plan(
        self,
        recorded: Iterable[Recorded],
        groups: Groups,
        last: Iterable[Recorded],
    ) -> Iterator[tuple[int, Assignment]]:
        """Yields (section, assignment) of all that is known beforehand, in order."""
        section = next(self._sections)
        for seq, ids in recorded:
            yield section, self._new(ids, seq=seq)
        for batches in groups:
            section = next(self._sections)
            for ids in batches:
                yield section, self._new(ids)
        for seq, ids in last:
            yield next(self._sections), self._new(ids, seq=seq, is_last=True)

    def _new(
        self,
        ids: tuple[str, ...],
        *,
        seq: int | None = None,
        is_retry: bool = False,
        is_last: bool = False,
    ) -> Assignment:
        number = next(self._numbers)
        return Assignment(number=number, ids=ids, seq=seq, is_retry=is_retry, is_last=is_last)
