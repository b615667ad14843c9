"""The schedule without engine or store: any interleaving of assignments, splits and retries."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensebatch.executor.schedule import Assignment, Idle, Schedule

Ids = tuple[str, ...]

MAX_TRIES = 3


@dataclass(frozen=True)
class Work:
    """What there is to do, and how it goes."""

    recorded: list[Ids]
    groups: list[list[Ids]]
    last: list[Ids]
    fails: dict[str, int]
    """How often a job fails before it succeeds."""
    breaks: frozenset[Ids]
    """Batches that fail as a whole, and are split in halves."""

    @property
    def ids(self) -> list[str]:
        batches = [*self.recorded, *itertools.chain(*self.groups), *self.last]
        return [job_id for ids in batches for job_id in ids]

    def schedule(self) -> Schedule:
        """Returns the work as a schedule; numbers on record are those of nothing else."""
        seqs = itertools.count(1000)
        return Schedule(
            recorded=[(next(seqs), ids) for ids in self.recorded],
            groups=self.groups,
            last=[(next(seqs), ids) for ids in self.last],
        )


def halves(ids: Ids) -> list[Ids]:
    middle = -(-len(ids) // 2)
    return [ids[:middle], ids[middle:]]


@st.composite
def works(draw: st.DrawFn) -> Work:
    names = (f"j{number}" for number in itertools.count())

    def batches(most: int, most_jobs: int) -> list[Ids]:
        sizes = draw(st.lists(st.integers(1, most_jobs), max_size=most))
        return [tuple(itertools.islice(names, size)) for size in sizes]

    recorded = batches(3, 4)
    groups = [batches(4, 4) for _ in range(draw(st.integers(0, 3)))]
    last = batches(2, 1)
    work = Work(recorded, groups, last, {}, frozenset())
    fails = draw(st.dictionaries(st.sampled_from(work.ids or ["-"]), st.integers(1, MAX_TRIES)))
    together = [ids for ids in (*recorded, *itertools.chain(*groups)) if len(ids) > 1]
    broken = {ids for ids in together if draw(st.booleans())}
    broken |= {
        half for ids in broken for half in halves(ids) if len(half) > 1 and draw(st.booleans())
    }
    return Work(recorded, groups, last, fails, frozenset(broken))


@dataclass
class Driver:
    """Uses a schedule as a run does, and holds it to its promises on the way."""

    work: Work
    schedule: Schedule
    order: list[Ids] = field(default_factory=list)
    in_flight: list[Assignment] = field(default_factory=list)
    tries: Counter[str] = field(default_factory=Counter)
    ended: list[str] = field(default_factory=list)
    """Jobs that are done or given up."""
    held: set[int] = field(default_factory=set)
    due: list[Ids] = field(default_factory=list)
    """What assignments were split into and was not handed out yet."""

    def next(self) -> Assignment | Idle:
        expected = self.schedule.peek()
        assert self.schedule.peek() == expected, "looking changes nothing"
        found = self.schedule.next()
        if isinstance(found, Idle):
            assert (found is Idle.WAITING) == bool(self.in_flight)
            assert not self.due, "what was split waits for nothing"
            return found
        assert found == expected
        running = {job_id for other in self.in_flight for job_id in other.ids}
        assert running.isdisjoint(found.ids), "never twice at a time"
        assert not any(other.is_last for other in self.in_flight)
        assert not (found.is_last and self.in_flight)
        assert found.is_retry == (found.seq is None and bool(self.tries[found.ids[0]]))
        if self.due:
            assert found.ids == self.due.pop(0), "what was split comes next"
        self.order.append(found.ids)
        self.in_flight.append(found)
        return found

    def take(self, what: str, place: int) -> Assignment | Idle | None:
        """Takes one step: hands out, or ends or holds one of those in flight."""
        if what == "next":
            return self.next()
        if what == "end":
            self.end(self.in_flight[place])
        else:
            self.held.add(self.in_flight[place].number)
            self.schedule.hold(self.in_flight[place])
        return None

    def end(self, assignment: Assignment) -> None:
        """Ends an assignment in flight, as the work says."""
        self.in_flight.remove(assignment)
        if assignment.ids in self.work.breaks:
            parts = halves(assignment.ids)
            self.due += parts
            seqs = itertools.count(len(self.order) * 10)
            self.schedule.split(assignment, zip(seqs, parts, strict=False))
            return
        for job_id in assignment.ids:
            self.tries[job_id] += 1
            failed = self.tries[job_id] <= self.work.fails.get(job_id, 0)
            if failed and self.tries[job_id] < MAX_TRIES:
                self.schedule.retry(job_id)
            else:
                self.ended.append(job_id)
        self.schedule.done(assignment)

    def may_retry(self, assignment: Assignment) -> bool:
        """Whether an assignment that was run has failures."""
        return assignment.ids not in self.work.breaks and any(
            self.tries[job_id] < self.work.fails.get(job_id, 0) for job_id in assignment.ids
        )


def in_order(work: Work) -> Iterator[Ids]:
    """Yields the batches of one worker, in so many words: the specification."""
    tries: Counter[str] = Counter()

    def is_tried_again(job_id: str) -> bool:
        tries[job_id] += 1
        return tries[job_id] <= work.fails.get(job_id, 0) and tries[job_id] < MAX_TRIES

    for section in (work.recorded, *work.groups, *([ids] for ids in work.last)):
        retries: list[str] = []
        for batch in section:
            queue = [batch]
            while queue:
                ids = queue.pop(0)
                yield ids
                if ids in work.breaks:
                    queue += halves(ids)
                    continue
                retries += filter(is_tried_again, ids)
        while retries:
            (job_id, *retries) = retries
            yield (job_id,)
            retries += filter(is_tried_again, [job_id])


def run_one_at_a_time(work: Work) -> Driver:
    """Uses a schedule as a run with one worker does: one batch runs while another is written."""
    driver = Driver(work, work.schedule())
    writing: Assignment | None = None

    def settle() -> None:
        nonlocal writing
        if writing is not None:
            driver.end(writing)
        writing = None

    while (found := driver.next()) is not Idle.FINISHED:
        if not isinstance(found, Assignment):
            assert writing is not None
            settle()
        elif found.ids in work.breaks:
            driver.end(found)
        else:
            settle()
            if driver.may_retry(found):
                driver.schedule.hold(found)
            writing = found
            if found.is_retry:
                settle()
    return driver


@given(work=works())
def test_one_worker_runs_recorded_batches_then_groups_each_with_its_retries(work: Work) -> None:
    driver = run_one_at_a_time(work)
    assert driver.order == list(in_order(work))
    assert sorted(driver.ended) == sorted(work.ids)


@given(work=works(), width=st.integers(1, 5), data=st.data())
def test_every_job_is_handed_out_until_it_ends_and_never_twice_at_a_time(
    work: Work, width: int, data: st.DataObject
) -> None:
    driver = Driver(work, work.schedule())
    steps: list[tuple[str, int]] = []
    while True:
        # Each place is one that is in flight, to be held or ended; the one after them hands out.
        places = range(len(driver.in_flight) + (len(driver.in_flight) < width))
        what, place = "next", data.draw(st.sampled_from(places), label="place")
        if place < len(driver.in_flight):
            is_held = driver.in_flight[place].number in driver.held
            what = "end" if is_held or data.draw(st.booleans(), label="end") else "hold"
        steps.append((what, place))
        if driver.take(what, place) is Idle.FINISHED:
            break
    assert sorted(driver.ended) == sorted(work.ids)
    assert all(driver.tries[job_id] <= MAX_TRIES for job_id in work.ids)
    assert driver.schedule.next() is Idle.FINISHED
    assert replayed(work, steps) == driver.order


def replayed(work: Work, steps: Sequence[tuple[str, int]]) -> list[Ids]:
    """Returns the order of a second schedule under the same steps."""
    driver = Driver(work, work.schedule())
    for what, place in steps:
        driver.take(what, place)
    return driver.order


def test_retries_wait_for_the_end_of_their_group() -> None:
    schedule = Schedule(groups=[[("a", "b"), ("c",)], [("d",)]])
    first = schedule.next()
    assert isinstance(first, Assignment)
    schedule.retry("b")
    schedule.done(first)
    found = [schedule.next() for _ in range(3)]
    assert [one.ids for one in found if isinstance(one, Assignment)] == [("c",), ("b",), ("d",)]
    assert [one.is_retry for one in found if isinstance(one, Assignment)] == [False, True, False]


def test_end_of_a_group_waits_for_what_may_bring_retries() -> None:
    schedule = Schedule(groups=[[("a",), ("b",)], [("c",)]])
    first, second = schedule.next(), schedule.next()
    assert isinstance(first, Assignment)
    assert isinstance(second, Assignment)
    schedule.hold(first)
    assert schedule.next() is Idle.WAITING
    schedule.done(first)
    schedule.retry("a")
    found = [schedule.next() for _ in range(2)]
    assert [one.ids for one in found if isinstance(one, Assignment)] == [("a",), ("c",)]


def test_without_failures_the_end_of_a_group_keeps_no_worker_idle() -> None:
    schedule = Schedule(groups=[[("a",)], [("b",)]])
    assert isinstance(schedule.next(), Assignment)
    assert isinstance(schedule.next(), Assignment)
    assert schedule.next() is Idle.WAITING


def test_what_is_not_in_flight_cannot_end() -> None:
    schedule = Schedule(groups=[[("a",)]])
    assignment = schedule.peek()
    assert assignment is not None
    with pytest.raises(KeyError):
        schedule.done(assignment)


def test_plan_is_read_only_as_far_as_it_is_needed() -> None:
    taken = []

    def batches() -> Iterator[Ids]:
        for number in range(100):
            taken.append(number)
            yield (f"j{number}",)

    schedule = Schedule(groups=[batches()])
    schedule.next()
    assert len(taken) == 2


def test_a_lane_reads_its_next_part_while_another_is_in_flight() -> None:
    read: list[str] = []

    def parts(name: str) -> Iterator[list[list[Ids]]]:
        for number in range(2):
            read.append(f"{name}{number}")
            yield [[(f"{name}{number}x",), (f"{name}{number}y",)]]

    schedule = Schedule(groups=[[("first",)]], later=[parts("a"), parts("b")])
    first = schedule.next()
    assert isinstance(first, Assignment)
    assert schedule.next() is Idle.WAITING
    assert read == []
    schedule.done(first)
    flying = [one for one in (schedule.next() for _ in range(4)) if isinstance(one, Assignment)]
    assert [one.ids[0] for one in flying] == ["a0x", "a0y", "b0x", "b0y"]
    assert schedule.next() is Idle.WAITING
    for one in flying[:2]:
        schedule.done(one)
    assert schedule.peek() is not None
    assert read == ["a0", "b0", "a1"]
    schedule.done(flying[2])
    again = schedule.next()
    assert isinstance(again, Assignment)
    assert again.ids == ("a1x",)
    schedule.retry("b0y")
    schedule.done(flying[3])
    # The lane that is less far comes first, with what is to be tried again, and reads on after it.
    retried = schedule.next()
    assert isinstance(retried, Assignment)
    assert (retried.ids, retried.is_retry, read[-1]) == (("b0y",), True, "a1")
    schedule.done(retried)
    rest = [one for one in (schedule.next() for _ in range(3)) if isinstance(one, Assignment)]
    assert [one.ids[0] for one in rest] == ["a1y", "b1x", "b1y"]
    for one in (again, *rest):
        schedule.done(one)
    assert schedule.next() is Idle.FINISHED


def test_a_lane_that_waits_for_the_end_of_a_group_keeps_no_other_one_waiting() -> None:
    lanes = [iter([[[("a1",)], [("a2",)]]]), iter([[[("b1",)]]])]
    schedule = Schedule(later=lanes)
    first = schedule.next()
    assert isinstance(first, Assignment)
    assert first.ids == ("a1",)
    schedule.hold(first)
    other = schedule.next()
    assert isinstance(other, Assignment)
    assert other.ids == ("b1",)
    assert schedule.next() is Idle.WAITING
