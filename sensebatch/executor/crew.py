"""Runs a schedule on several workers in processes of their own. Knows no backend.

The thread that runs this owns the run's folder and does everything in turn: it hands out
assignments, takes news, and has results committed. Threads beside it read input images, write kept
images and write results; what they finish comes back as an event. A batch is on record before it
is handed out, and stays there until it is committed, split, or all its jobs are given up; so
whatever dies, it runs again in the same composition. Its start counts against it only where a
worker dies of it, which, unlike a death of one's own, can be seen.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import IntEnum
from functools import partial
from typing import TypeAlias

from sensebatch.config import RunConfig
from sensebatch.contract import Concerns, Progress, Raised, Stop
from sensebatch.executor.claim import claim_batches
from sensebatch.executor.deadline import Deadline
from sensebatch.executor.judging import MAX_WAITING, Judging
from sensebatch.executor.ledger import Begun, Ledger
from sensebatch.executor.levels import plan_levels
from sensebatch.executor.messages import (
    Advanced,
    Began,
    Died,
    Drew,
    Ended,
    GaveBack,
    GiveBack,
    KeptOnDisk,
    Prepare,
    Prepared,
    RanJobs,
    Ready,
    Run,
    Said,
    StopWork,
)
from sensebatch.executor.observer import Observer, Summary, Tally, WorkerState, report
from sensebatch.executor.prepare import read_inputs
from sensebatch.executor.recovery import (
    MAX_DEATHS,
    Blame,
    Recovered,
    death,
    recover,
    worker_death,
)
from sensebatch.executor.roster import TICK_S, Member, Roster
from sensebatch.executor.schedule import Assignment, Idle, Recorded, Schedule
from sensebatch.functions import Judge
from sensebatch.jobs import (
    BatchMetrics,
    BatchResult,
    EncodedJob,
    Failure,
    GroupKey,
    InputImage,
    group_key,
)
from sensebatch.plan.patience import patience_s
from sensebatch.store.attempts import Attempt
from sensebatch.store.kept import KeptOfBatch
from sensebatch.store.store import Store
from sensebatch.store.writer import BatchWriter
from sensebatch.units import counted

MAX_GIVEN = 3
"""Assignments that a worker has at a time: one that runs, and two that wait. More where the texts
of more are written together."""
MAX_UNWRITTEN_BYTES, MAX_UNWRITTEN = 1 << 30, 64
"""Bytes of images, and batches, that wait to be written, after which nothing more is handed out."""
NUM_READERS = 2
"""Threads that read input images, and as many that write kept images."""
MAX_PAUSE_S = 30.0
"""After which a pause in the executor's own thread means that its process was stopped."""


_OfAssignment: TypeAlias = Prepared | Began | Advanced | Drew | Ended | GaveBack


class Stage(IntEnum):
    """How far an assignment is."""

    READING = 0
    """Its input images are being read, by this process."""
    PREPARING = 1
    """The worker prepares it."""
    WAITING = 2
    """It is the worker's, to be run."""
    RUNNING = 3
    """It is in the engine."""
    ENDING = 4
    """It has left the engine; its images are being encoded."""


@dataclass(slots=True, eq=False)
class _Given:
    """An assignment that a worker has."""

    begun: Begun
    stage: Stage = Stage.READING
    unreadable: dict[int, Raised] = field(default_factory=dict)
    """Why jobs cannot be run, by their index in the batch."""
    asked_back: bool = False
    kept: KeptOfBatch | None = None
    saving: Future[None] | None = None
    """Images of it that are being kept."""
    progress: Progress | None = None

    @property
    def number(self) -> int:
        """The assignment's number."""
        return self.begun.assignment.number


@dataclass(slots=True)
class _Desk:
    """What lies before a worker."""

    member: Member
    given: dict[int, _Given] = field(default_factory=dict)
    is_exclusive: bool = False
    """Whether it has an assignment that nothing may be beside."""
    was_told_to_stop: bool = False

    @property
    def most_given(self) -> int:
        """How many assignments it may have: more where texts of several are written together."""
        ready, latest = self.member.ready, next(reversed(self.given.values()), None)
        if ready is None or latest is None:
            return MAX_GIVEN
        return max(MAX_GIVEN, 1 + ready.following.get(latest.begun.batch.group, 0))

    @property
    def running(self) -> _Given | None:
        """What is in the worker's engine."""
        return next((one for one in self.given.values() if one.stage is Stage.RUNNING), None)

    @property
    def at_work(self) -> list[_Given]:
        """What the worker may be at: it may have begun a batch and not have said so."""
        first = [one for one in self.given.values() if one.stage is Stage.WAITING][:1]
        preparing = [one for one in self.given.values() if one.stage is Stage.PREPARING]
        running = self.running
        return [*preparing, *(first if running is None else [running])]


def execute_crew(
    *,
    store: Store,
    roster: Roster,
    config: RunConfig,
    read_image: Callable[[InputImage], bytes],
    observer: Observer,
    stop: Stop,
    deadline: Deadline | None = None,
    functions: Mapping[str, Judge] | None = None,
) -> Summary:
    """Runs every job of the store that is neither done nor given up, on several workers.

    Args:
        store: The run's folder, with the manifests ingested.
        roster: The workers; assembled.
        config: The run's settings.
        read_image: Returns an input image's encoded bytes; raises JobError where it cannot.
        observer: Who watches.
        stop: As for `run.execute`, for every batch that is in an engine.
        deadline: As for `run.execute`.
        functions: As for `run.execute`; they run in this process.

    Raises:
        RunStoppedError: As `run.execute`; WorkersLostError if no worker is left.
        RunFolderError: The folder can no longer be written.
    """
    start = time.monotonic()
    deadline = Deadline() if deadline is None else deadline
    if config.execution.retry_failed:
        store.state.retry_failed()
    with (
        store.complete_log(),
        BatchWriter(store, config.output, config.execution) as writer,
        ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read") as readers,
        ThreadPoolExecutor(NUM_READERS, thread_name_prefix="keep") as keepers,
        Judging(functions or {}, read_image, store.state.rows) as judging,
    ):
        run = _CrewRun(
            store=store,
            roster=roster,
            config=config,
            writer=writer,
            pools=_Pools(readers=readers, keepers=keepers, judging=judging, read_image=read_image),
            observer=observer,
            ends=_Ends(stop=deadline.beside(stop), deadline=deadline),
        )
        try:
            with run.blame.lifted():
                run.loop()
        finally:
            run.pools.cancel()
    seconds = time.monotonic() - start
    store.settle(keep_rejected=config.output.keep_rejected)
    return run.tally.summary(store.state, stop, seconds, deadline)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pools:
    """The threads beside the executor's."""

    readers: ThreadPoolExecutor
    keepers: ThreadPoolExecutor
    judging: Judging
    read_image: Callable[[InputImage], bytes]

    def cancel(self) -> None:
        """Lets nothing more begin."""
        self.readers.shutdown(wait=False, cancel_futures=True)
        self.keepers.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """What ends a run, or a worker's life, early."""

    stop: Stop
    deadline: Deadline


class _CrewRun:
    """One call of `execute_crew`."""

    def __init__(
        self,
        *,
        store: Store,
        roster: Roster,
        config: RunConfig,
        writer: BatchWriter,
        pools: _Pools,
        observer: Observer,
        ends: _Ends,
    ) -> None:
        self._store, self._roster, self.pools = store, roster, pools
        self._observer, self._ends = observer, ends
        self._start = self._look_at = time.monotonic()
        self._desks: dict[int, _Desk] = {}
        self._returned: deque[Begun] = deque()
        """Batches that came back; they go out before anything else."""
        self._unwritten_bytes = self._num_unwritten = 0
        self._judged: set[int] = set()
        """Numbers of batches that functions judge, which may end this process."""
        self.blame = Blame(store.state)
        self._is_ending = False
        self.tally = Tally(observer, config.execution)
        fitting = roster.fitting()
        found = self._recovered(config, fitting.get)
        num_workers = sum(1 for _ in roster.ready())
        levels = plan_levels(store, config, fitting.get, ends.deadline, num_workers)
        self._planned = {group.group: group.batch_size for group in levels.plan.groups}
        self._schedule = Schedule(
            recorded=(*found.recorded, *found.suspects),
            groups=levels.groups,
            later=levels.later,
        )
        self._ledger = Ledger(
            store=store,
            writer=writer,
            schedule=self._schedule,
            observer=observer,
            tally=self.tally,
            deadline=ends.deadline,
        )
        report(observer.run_started, store.state.counts(), levels.plan)
        self._judge_by = next(roster.ready()).by
        roster.changed = self._show
        for member in roster.ready():
            self._seat(member)
        for batch in found.given_up:
            self._give_up(batch)

    def loop(self) -> None:
        """Hands out assignments and takes news until all is done or the run is to stop.

        Raises:
            RunStoppedError: See `execute_crew`.
            RunFolderError: Likewise.
        """
        while True:
            self._heed_stop()
            self._hand_out()
            if self._is_through():
                return
            for event in self._roster.wait():
                if isinstance(event, Said):
                    self._hear(event)
                else:
                    event()
            if time.monotonic() >= self._look_at:
                self._look_after()

    def _recovered(self, config: RunConfig, fitting: Callable[[GroupKey], int | None]) -> Recovered:
        """Returns what an earlier process left, in a folder whose batches are the run's own."""
        note = partial(report, self._observer.note)
        found = recover(self._store, fitting, config.memory, note)
        self._suspects = {seq for seq, _ in found.suspects}
        self._doubtful = set(found.doubtful) | self._suspects
        """Numbers of batches that something died of: nothing is beside them at their worker, or
        with functions."""
        claim_batches(self._store, config, fitting, note)
        return found

    def _give_up(self, batch: Recorded) -> None:
        """Fails a job that earlier lives of workers, or of this process, have died of."""
        (stored,) = self._store.state.jobs(batch[1])
        why = worker_death() if stored.job.judged_by is None else death()
        self._ledger.give_up(batch, self._judge_by, why)

    def _look_after(self) -> None:
        """Does what depends on the clock alone."""
        now = time.monotonic()
        if now > self._look_at + MAX_PAUSE_S:
            # This process was stopped, and could not hear anyone.
            for desk in self._desks.values():
                desk.member.heard = now
        self._look_at = now + TICK_S
        self._roster.tend()
        self._roster.require_some()
        self._end_silent()

    def _is_through(self) -> bool:
        if self._num_unwritten or any(desk.given for desk in self._desks.values()):
            return False
        if self._is_ending:
            return True
        return not self._returned and self._schedule.is_finished

    def _hand_out(self) -> None:
        """Gives assignments to the workers that have the fewest, as long as one has room."""
        while not self._is_ending and self._can_take_more:
            desk = self._freest()
            if desk is None:
                return
            begun = self._next(desk)
            if begun is None:
                self._level()
                return
            if begun.batch.group.by_function:
                self._judge(begun)
            else:
                self._give(desk, begun)

    @property
    def _can_take_more(self) -> bool:
        if len(self._judged) >= MAX_WAITING or not self._judged.isdisjoint(self._doubtful):
            return False
        return self._unwritten_bytes <= MAX_UNWRITTEN_BYTES and self._num_unwritten <= MAX_UNWRITTEN

    def _judge(self, begun: Begun) -> None:
        """Has functions judge a batch, beside whatever the workers do.

        They may end this process, so the batch's start is counted, unlike that of one that is
        drawn elsewhere.
        """
        self._store.state.start(begun.seq, 0)
        self.blame.take(begun.seq)
        self._judged.add(begun.seq)
        future = self.pools.judging.start(begun.jobs)
        judged = partial(self._was_judged, begun, future)
        future.add_done_callback(lambda _: self._roster.events.put(judged))

    def _was_judged(self, begun: Begun, future: Future[BatchResult]) -> None:
        self._judged.discard(begun.seq)
        self._num_unwritten += 1
        result, by = future.result(), next(self._roster.ready(), None)
        self._judge_by = self._judge_by if by is None else by.by
        written = self._ledger.write(begun, result.results, result.metrics, self._judge_by)
        was_written = partial(self._was_written, begun, 0, written)
        written.add_done_callback(lambda _: self._roster.events.put(was_written))

    def _freest(self) -> _Desk | None:
        open_desks = [
            desk
            for desk in self._desks.values()
            if len(desk.given) < desk.most_given and not desk.is_exclusive
        ]
        return min(open_desks, key=lambda desk: len(desk.given), default=None)

    def _next(self, desk: _Desk) -> Begun | None:
        """Returns the batch that comes next, on record, if this worker may have it now."""
        if self._returned:
            first = self._returned[0]
            if first.seq in self._doubtful and desk.given:
                return None
            if not self._admits(desk, [job.id for job in first.batch.jobs]):
                return None
            return self._returned.popleft()
        expected = self._schedule.peek()
        if expected is not None:
            if expected.seq in self._doubtful and (desk.given or self._judged):
                return None
            if not self._admits(desk, expected.ids):
                return None
        found = self._schedule.next()
        if isinstance(found, Idle):
            return None
        return self._record(found)

    def _admits(self, desk: _Desk, ids: Sequence[str]) -> bool:
        """Returns whether a batch would be through by the deadline after what a worker has."""
        if not self._ends.deadline.is_given:
            return True
        queued_s = sum(
            self._ends.deadline.seconds(given.begun.batch.group, len(given.begun.jobs))
            for given in desk.given.values()
        )
        (first,) = self._store.state.jobs(ids[:1])
        is_admitted = self._ends.deadline.admits(group_key(first.job), len(ids), queued_s=queued_s)
        self._is_ending = self._is_ending or self._ends.deadline.has_ended_run
        return is_admitted

    def _record(self, assignment: Assignment) -> Begun:
        self._store.run_dir.require_in_place()
        return self._ledger.hand_out(
            assignment,
            queue_s=time.monotonic() - self._start,
            started_at=datetime.now(UTC),
        )

    def _give(self, desk: _Desk, begun: Begun) -> None:
        begun = replace(begun, queue_s=time.monotonic() - self._start, started_at=datetime.now(UTC))
        given = _Given(begun)
        desk.given[given.number] = given
        desk.member.heard = time.monotonic()
        desk.is_exclusive = begun.seq in self._doubtful
        if any(job.images for job in begun.batch.jobs):
            self.pools.readers.submit(self._read, desk, given)
        else:
            self._was_read(desk, given, [[] for _ in begun.jobs])

    def _read(self, desk: _Desk, given: _Given) -> None:
        """Reads input images; in a thread of its own."""
        jobs = given.begun.batch.jobs
        inputs = [read_inputs(job, self.pools.read_image) for job in jobs]
        self._roster.events.put(partial(self._was_read, desk, given, inputs))

    def _was_read(self, desk: _Desk, given: _Given, inputs: Sequence[list[bytes] | Raised]) -> None:
        if desk.given.get(given.number) is not given:
            return
        given.unreadable = {
            index: one for index, one in enumerate(inputs) if isinstance(one, Raised)
        }
        given.stage = Stage.PREPARING
        desk.member.heard = time.monotonic()
        readable = [
            (job, one)
            for job, one in zip(given.begun.batch.jobs, inputs, strict=True)
            if not isinstance(one, Raised)
        ]
        if not readable:
            self._was_prepared(desk, given, ())
            return
        jobs, images = zip(*readable, strict=True)
        self._roster.crew.tell(
            desk.member.number, Prepare(number=given.number, jobs=jobs, inputs=images)
        )

    def _level(self) -> None:
        """Asks the workers that have the most for what could begin at those that have nothing."""
        idle = sum(not desk.given for desk in self._desks.values())
        idle -= sum(one.asked_back for desk in self._desks.values() for one in desk.given.values())
        if idle <= 0:
            return
        for desk in sorted(self._desks.values(), key=lambda desk: -len(desk.given)):
            *_, last = desk.given.values() or (None,)
            if idle and len(desk.given) > 1 and last is not None and not last.asked_back:
                idle -= self._ask_back(desk, last)

    def _ask_back(self, desk: _Desk, given: _Given) -> bool:
        """Takes back an assignment that has not begun; returns whether the worker is asked."""
        if given.asked_back or given.stage > Stage.WAITING:
            return False
        if given.stage is Stage.READING:
            self._take_back(desk, given)
            return False
        given.asked_back = True
        self._roster.crew.tell(desk.member.number, GiveBack(number=given.number))
        return True

    def _take_back(self, desk: _Desk, given: _Given) -> None:
        self._remove(desk, given)
        self._returned.append(given.begun)

    def _heed_stop(self) -> None:
        """Once the run is to end, takes back what has not begun."""
        is_stopped = self._ends.stop.is_set()
        if not is_stopped and not self.tally.too_many_failures:
            return
        self._is_ending = True
        for desk in self._desks.values():
            for given in list(desk.given.values()):
                self._ask_back(desk, given)
            if is_stopped and not desk.was_told_to_stop:
                desk.was_told_to_stop = True
                self._roster.crew.tell(desk.member.number, StopWork())

    def _hear(self, said: Said) -> None:
        member = self._roster.hear(said)
        if member is None:
            return
        news = said.news
        if isinstance(news, Ready):
            self._admit(member)
            return
        desk = self._desks[member.number]
        if isinstance(news, Died):
            self._lose(desk, is_of_node=news.is_of_node)
            return
        assert isinstance(news, _OfAssignment)
        given = desk.given.get(news.number)
        if given is not None:
            self._hear_of(desk, given, news)

    def _hear_of(self, desk: _Desk, given: _Given, news: _OfAssignment) -> None:
        match news:
            case Prepared():
                self._was_prepared(desk, given, news.outcomes)
            case Began():
                self._began(desk, given)
            case Advanced():
                given.progress = news.progress
                group = given.begun.batch.group
                self._ends.deadline.advanced(desk.member.number, group, news.progress)
                self._show(desk.member)
            case Drew():
                self._keep(desk, given, news)
            case Ended():
                self._ended(desk, given, news)
            case GaveBack():
                self._take_back(desk, given)

    def _admit(self, member: Member) -> None:
        """Gives a worker a desk that started, or started again, during the run."""
        assert member.ready is not None
        for group, jobs in member.ready.fitting.items():
            planned = self._planned.get(group)
            if jobs is not None and planned is not None and jobs < planned:
                self._roster.refuse(
                    member,
                    f"{counted(jobs, 'job')} of {group} at a time fit its memory, and the run is "
                    f"planned for {planned}; a run that is started with it plans for that",
                )
                return
        self._seat(member)

    def _seat(self, member: Member) -> None:
        self._desks[member.number] = _Desk(member)
        self._show(member)

    def _was_prepared(self, desk: _Desk, given: _Given, outcomes: Sequence[Raised | None]) -> None:
        """Has a batch run without the jobs that could not be prepared."""
        of_worker = iter(outcomes)
        merged = [
            given.unreadable[index] if index in given.unreadable else next(of_worker)
            for index in range(len(given.begun.jobs))
        ]
        broken = next((one for one in outcomes if one and one.concerns is Concerns.RUN), None)
        if broken is not None:
            self._fail(desk, broken)
            return
        if any(merged):
            begun = self._ledger.narrow(given.begun, merged, desk.member.by)
            if begun is None:
                self._remove(desk, given)
                return
            self._doubtful -= {given.begun.seq}
            given.begun = begun
        given.stage = Stage.WAITING
        given.kept = self._store.kept.of_batch(given.begun.seq, given.begun.batch)
        # One that was asked back meanwhile is on its way, and the worker has forgotten it.
        if not given.asked_back:
            self._tell_to_run(desk, given)

    def _tell_to_run(self, desk: _Desk, given: _Given) -> None:
        assert given.kept is not None
        order = Run(number=given.number, batch=given.begun.batch, kept=given.kept.load())
        self._roster.crew.tell(desk.member.number, order)

    def _began(self, desk: _Desk, given: _Given) -> None:
        if (before := desk.running) is not None:
            before.stage = Stage.ENDING
        given.stage, given.asked_back = Stage.RUNNING, False
        given.begun = replace(
            given.begun, queue_s=time.monotonic() - self._start, started_at=datetime.now(UTC)
        )
        self._show(desk.member)

    def _keep(self, desk: _Desk, given: _Given, news: Drew) -> None:
        """Writes images that are to be kept, and lets the worker know."""
        assert given.kept is not None
        given.saving = self.pools.keepers.submit(given.kept.save, news.drawn)
        kept = partial(self._was_kept, desk, given, given.saving)
        given.saving.add_done_callback(lambda _: self._roster.events.put(kept))

    def _was_kept(self, desk: _Desk, given: _Given, saving: Future[None]) -> None:
        saving.result()
        if desk.given.get(given.number) is given:
            self._roster.crew.tell(desk.member.number, KeptOnDisk(number=given.number))

    def _ended(self, desk: _Desk, given: _Given, news: Ended) -> None:
        outcome = news.outcome
        desk.member.info, desk.member.deaths = news.info, 0
        if isinstance(outcome, RanJobs):
            self._write(desk, given, outcome.results, outcome.metrics, news)
        elif outcome.failure.type == "BatchStoppedError":
            # It stays on record, as a kill would leave it.
            self._remove(desk, given)
        elif outcome.concerns is Concerns.RUN:
            self._fail(desk, outcome)
        elif len(given.begun.jobs) > 1:
            self._doubtful.discard(given.begun.seq)
            self._ledger.split(given.begun, outcome)
            self._remove(desk, given)
        elif news.room is not None:
            report(self._observer.note, f"{desk.member.name}: {news.room}")
            given.stage = Stage.WAITING
            self._tell_to_run(desk, given)
        else:
            metrics = BatchMetrics(total_s=news.seconds)
            self._write(desk, given, (outcome.failure,), metrics, news)

    def _write(
        self,
        desk: _Desk,
        given: _Given,
        results: Sequence[EncodedJob | Failure],
        metrics: BatchMetrics,
        news: Ended,
    ) -> None:
        """Hands results to the writer."""
        self._remove(desk, given)
        by = replace(desk.member.by, peak_rss_bytes=news.peak_rss_bytes)
        size = sum(
            len(image)
            for result in results
            if isinstance(result, EncodedJob)
            for image in result.images
        )
        self._unwritten_bytes += size
        self._num_unwritten += 1
        future = self._ledger.write(given.begun, results, metrics, by)
        written = partial(self._was_written, given.begun, size, future)
        future.add_done_callback(lambda _: self._roster.events.put(written))

    def _was_written(self, begun: Begun, size: int, future: Future[tuple[Attempt, ...]]) -> None:
        attempts = future.result()
        self._unwritten_bytes -= size
        self._num_unwritten -= 1
        self._doubtful.discard(begun.seq)
        self._suspects.discard(begun.seq)
        self.blame.drop(begun.seq)
        self._ledger.committed(begun, attempts)

    def _remove(self, desk: _Desk, given: _Given) -> None:
        del desk.given[given.number]
        desk.is_exclusive = False
        self._show(desk.member)

    def _end_silent(self) -> None:
        """Ends workers that have said nothing for longer than their batch can take."""
        now = time.monotonic()
        for desk in list(self._desks.values()):
            patience_s = self._patience_s(desk)
            is_silent = now - max(desk.member.heard, desk.member.since) > patience_s
            if is_silent and any(one.stage > Stage.READING for one in desk.given.values()):
                self._roster.crew.end(desk.member.number)
                if self._roster.lose(desk.member, f"no message from it for {patience_s:.0f} s"):
                    self._lose(desk, is_of_node=False)

    def _patience_s(self, desk: _Desk) -> float:
        """Returns how long a worker may say nothing, by what it is at; see `plan.patience`."""
        device, known_s = desk.member.by.info.device, list[float | None]()
        if desk.running is not None:
            group, num_jobs = desk.running.begun.batch.group, len(desk.running.begun.jobs)
            known_s.append(self._ends.deadline.measured_seconds(group, num_jobs))
            if self._roster.planned is not None:
                known_s.append(self._roster.planned.of(device, group, num_jobs))
        return patience_s(*known_s, on_cpu=device == "cpu")

    def _fail(self, desk: _Desk, raised: Raised) -> None:
        """Starts a worker again that says that it is of no more use."""
        reason = f"{raised.failure.type}: {raised.failure.message}"
        if self._roster.lose(desk.member, reason):
            self._lose(desk, is_of_node=False)

    def _lose(self, desk: _Desk, *, is_of_node: bool) -> None:
        """Takes back what a dead worker had, and blames what it may have died of."""
        del self._desks[desk.member.number]
        lost, blamed = list(desk.given.values()), [] if is_of_node else desk.at_work
        desk.given.clear()
        self._show(desk.member)
        back = []
        for given in lost:
            if given.saving is not None:
                given.saving.result()
            if self._is_ending or given not in blamed or self._is_forgiven(desk, given):
                back.append(given.begun)
        self._returned.extendleft(reversed(back))

    def _is_forgiven(self, desk: _Desk, given: _Given) -> bool:
        """Counts a death against a batch; returns whether it may run again as it is."""
        begun, seq = given.begun, given.begun.seq
        deaths = self._store.state.start(seq, self._store.kept.num_rounds(seq))
        self._doubtful.add(seq)
        if deaths < MAX_DEATHS:
            return True
        self._doubtful.discard(seq)
        if seq in self._suspects:
            self._suspects.discard(seq)
            ids = tuple(job.id for job in begun.batch.jobs)
            self._ledger.give_up((seq, ids), desk.member.by, worker_death(), queue_s=begun.queue_s)
            self._schedule.done(begun.assignment)
            return False
        parts = {part for part, _ in self._ledger.take_apart(begun, deaths)}
        self._suspects |= parts
        self._doubtful |= parts
        return False

    def _show(self, member: Member) -> None:
        """Reports what a worker is at; nothing of one that was never ready."""
        desk = self._desks.get(member.number)
        running = None if desk is None else desk.running
        if member.ready is None:
            return
        state = WorkerState(
            number=member.number,
            node=member.ready.node,
            device=member.ready.device,
            life=member.state,
            batch=None if running is None else running.begun.batch,
            progress=None if running is None else running.progress,
        )
        report(self._observer.worker_changed, state)
