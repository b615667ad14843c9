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


class Schedule:
    """Hands out every job until it is done or given up, never twice at a time.

    Args:
        recorded: Batches that are on record as started; they come first.
        groups: The batches of each group of the plan; read as they are needed.
        last: Batches on record that come after all others, each with nothing else in flight.
        later: More groups for each time that nothing else is left, read when that is so: they may
            depend on what became of everything before.
    """

    def __init__(
        self,
        *,
        recorded: Iterable[Recorded] = (),
        groups: Iterable[Iterable[tuple[str, ...]]] = (),
        last: Iterable[Recorded] = (),
        later: Iterable[Iterable[Iterable[tuple[str, ...]]]] = (),
    ) -> None:
        self._later = iter(later)
        self._sections = itertools.count()
        self._numbers = itertools.count(1)
        self._in_flight: dict[int, Assignment] = {}
        self._held: set[int] = set()
        """Numbers of assignments in flight that the end of a group waits for."""
        self._split: deque[Assignment] = deque()
        self._retries: deque[Assignment] = deque()
        self._planned = self._plan(recorded, groups, last)
        self._head = next(self._planned, None)
        self._section = 0
        """Section of the planned assignment that was handed out last: the batches on record,
        each group, and each of those that come last, are one."""

    def next(self) -> Assignment | Idle:
        """Hands out what comes next, which is in flight until `done` or `split`."""
        found = self.peek()
        if found is None:
            return Idle.WAITING if self._in_flight else Idle.FINISHED
        if self._must_wait(found):
            return Idle.WAITING
        if self._split:
            self._split.popleft()
        elif found.is_retry:
            self._retries.popleft()
        else:
            assert self._head is not None
            self._section, self._head = self._head[0], next(self._planned, None)
        self._in_flight[found.number] = found
        return found

    def peek(self) -> Assignment | None:
        """Returns what `next` hands out if nothing in flight fails; None if that is nothing."""
        self._go_on()
        return self._expected()

    def _expected(self) -> Assignment | None:
        if self._split:
            return self._split[0]
        if self._retries and self._is_at_end_of_group:
            return self._retries[0]
        return None if self._head is None else self._head[1]

    def split(self, assignment: Assignment, parts: Iterable[Recorded]) -> None:
        """Replaces an assignment in flight by smaller ones, which come next."""
        self.done(assignment)
        self._split.extend(self._new(ids, seq=seq) for seq, ids in parts)

    def retry(self, job_id: str) -> None:
        """Queues a job that failed to run alone at the end of the group.

        The job must not be running any more; the assignment that it was in may be in flight.
        """
        self._retries.append(self._new((job_id,), is_retry=True))

    def hold(self, assignment: Assignment) -> None:
        """Lets the end of the group wait for an assignment in flight, which may bring retries."""
        assert assignment.number in self._in_flight
        self._held.add(assignment.number)

    def done(self, assignment: Assignment) -> None:
        """Ends an assignment in flight: each of its jobs is done, given up, or to be retried."""
        del self._in_flight[assignment.number]
        self._held.discard(assignment.number)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is in flight and nothing is left to be handed out."""
        return not self._in_flight and self.peek() is None

    def _go_on(self) -> None:
        """Reads later groups once everything before them is through."""
        while not self._in_flight and self._expected() is None:
            groups = next(self._later, None)
            if groups is None:
                return
            self._planned = self._plan((), groups, ())
            self._head = next(self._planned, None)

    @property
    def _is_at_end_of_group(self) -> bool:
        """Whether what is handed out now belongs to another section than what was before."""
        return self._head is None or self._head[0] != self._section

    def _must_wait(self, found: Assignment) -> bool:
        """Whether something in flight has to end before an assignment is handed out."""
        if found.is_last:
            return bool(self._in_flight)
        return bool(self._held) and not self._split and self._is_at_end_of_group

    def _plan(
        self,
        recorded: Iterable[Recorded],
        groups: Iterable[Iterable[tuple[str, ...]]],
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
