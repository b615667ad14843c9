"""Runs what the schedule hands out, whatever single jobs do. Never sees torch.

While a batch is in the engine, the one before it is encoded, written and committed, and the one
after it is prepared. The order of steps keeps a promise: a batch's composition is recorded before
it runs, its files are in place before it is committed, and it is committed whole. So what a kill
at any moment leaves is run in the compositions it would have been run in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from sensebatch.config import RunConfig
from sensebatch.contract import Channel, Concerns, Drawn, Progress, Raised, Stop, Worker
from sensebatch.errors import BatchStoppedError
from sensebatch.executor.claim import claim_batches
from sensebatch.executor.deadline import Deadline
from sensebatch.executor.guard import raise_again
from sensebatch.executor.head_start import HeadStart
from sensebatch.executor.judging import MAX_WAITING, Judging
from sensebatch.executor.ledger import Begun, Ledger, batch_of, members_of
from sensebatch.executor.levels import plan_levels
from sensebatch.executor.observer import Observer, Summary, Tally, report
from sensebatch.executor.prepare import Preparer
from sensebatch.executor.recovery import Blame, death, recover
from sensebatch.executor.schedule import Assignment, Idle, Schedule
from sensebatch.functions import Judge
from sensebatch.jobs import Batch, BatchMetrics, BatchResult, GroupKey, InputImage, group_key
from sensebatch.store.attempts import Attempt
from sensebatch.store.kept import KeptOfBatch
from sensebatch.store.state import StoredJob
from sensebatch.store.store import Store
from sensebatch.store.writer import BatchWriter, RanBy

POLL_S = 0.2
"""Seconds after which a run that waits for functions looks whether it is to stop."""


def execute(
    *,
    store: Store,
    worker: Worker,
    config: RunConfig,
    read_image: Callable[[InputImage], bytes],
    observer: Observer,
    stop: Stop,
    deadline: Deadline | None = None,
    functions: Mapping[str, Judge] | None = None,
) -> Summary:
    """Runs every job of the store that is neither done nor given up.

    Args:
        store: The run's folder, with the manifests ingested.
        worker: What generates. One whose weights are not loaded is given nothing: the run has
            functions judge and ends where anything else is next.
        config: The run's settings.
        read_image: Returns an input image's encoded bytes; raises JobError where it cannot.
        observer: Who watches.
        stop: Once set, the run ends: between two passes of the current batch if it has another,
            with that batch on record as started and its finished images kept; else after it.
        deadline: Ends the run likewise, and before a batch that would not be through by then. With
            one, batches come in the order of their first jobs in the manifests.
        functions: Those that judge images, by their names.

    Raises:
        RunStoppedError: The disk is full, or the device failed; what was committed stays, the
            rest can be resumed.
        RunFolderError: The folder can no longer be written.
    """
    start = time.monotonic()
    deadline = Deadline() if deadline is None else deadline
    if config.execution.retry_failed:
        store.state.retry_failed()
    head_start = HeadStart()
    with (
        store.complete_log(),
        BatchWriter(store, config.output, config.execution, head_start.wait) as writer,
        Preparer(worker, read_image) as preparer,
        Judging(functions or {}, read_image, store.state.rows) as judging,
    ):
        run = _Run(
            store=store,
            worker=worker,
            config=config,
            beside=_Beside(
                preparer=preparer, judging=judging, writer=writer, head_start=head_start
            ),
            observer=observer,
            stop=deadline.beside(stop),
            deadline=deadline,
        )
        # A batch that heeds the stop stays on record, as a kill would leave it.
        with run.blame.lifted():
            with suppress(BatchStoppedError):
                run.loop()
            run.settle()
    seconds = time.monotonic() - start
    store.settle(keep_rejected=config.output.keep_rejected)
    return run.tally.summary(store.state, stop, seconds, deadline)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beside:
    """What works while a batch is in the worker."""

    preparer: Preparer
    judging: Judging
    writer: BatchWriter
    head_start: HeadStart
    """Keeps what is written from delaying the start of the next batch."""


class _Run:
    """One call of `execute`."""

    def __init__(
        self,
        *,
        store: Store,
        worker: Worker,
        config: RunConfig,
        beside: _Beside,
        observer: Observer,
        stop: Stop,
        deadline: Deadline,
    ) -> None:
        self._deadline = deadline
        self._store = store
        self._worker = worker
        self._preparer, self._judging = beside.preparer, beside.judging
        self._head_start = beside.head_start
        self._verdicts: deque[tuple[Begun, Future[BatchResult]]] = deque()
        """Batches that functions judge."""
        self._observer = observer
        self._stop = stop
        self._start = time.monotonic()
        self._writing: tuple[Begun, Future[tuple[Attempt, ...]]] | None = None
        self.blame = Blame(store.state)
        self.tally = Tally(observer, config.execution)
        note = partial(report, observer.note)
        found = recover(store, self._fitting, config.memory, note)
        self._doubtful = found.doubtful
        claim_batches(store, config, self._fitting, note)
        levels = plan_levels(store, config, self._fitting, deadline, draws=worker.info.is_loaded)
        self._schedule = Schedule(
            recorded=found.recorded,
            groups=levels.groups,
            later=levels.later,
            last=found.suspects,
        )
        self._ledger = Ledger(
            store=store,
            writer=beside.writer,
            schedule=self._schedule,
            observer=observer,
            tally=self.tally,
            deadline=deadline,
        )
        report(observer.run_started, store.state.counts(), levels.plan)
        for batch in found.given_up:
            self._ledger.give_up(batch, self._by(), death())

    def loop(self) -> None:
        """Runs one assignment after the other until all are done or the run is to stop.

        Raises:
            BatchStoppedError: A batch heeded the stop.
            RunStoppedError: See `execute`.
            RunFolderError: Likewise.
        """
        while True:
            self._take_verdicts()
            found = self._schedule.next()
            if found is Idle.FINISHED:
                return
            if found is Idle.WAITING:
                self._wait()
                if self._verdicts and self._is_over():
                    return
            elif self._is_over() or not self._admits(found):
                return
            elif self._is_judged(found):
                self._judge(found)
            else:
                self._run(found)

    def _is_over(self) -> bool:
        """Returns whether the run ends with jobs left."""
        return self._stop.is_set() or self.tally.too_many_failures

    def _run(self, assignment: Assignment) -> None:
        """Has the worker run an assignment."""
        alone = self._is_alone(assignment)
        if alone:
            self._finish_verdicts()
        begun = self._begin(assignment)
        following = [] if alone or begun is None else self._following(begun)
        if not alone:
            self._prepare_next()
        if begun is not None:
            self._end(begun, self._generate(begun, following))
        self._worker.release(assignment.number)
        if alone:
            self.settle()

    def _fitting(self, group: GroupKey) -> int | None:
        return None if group.by_function else self._worker.largest_batch(group)

    def _is_judged(self, assignment: Assignment) -> bool:
        """Returns whether functions do the jobs of an assignment, and not the worker."""
        (first,) = self._store.state.jobs(assignment.ids[:1])
        return first.job.judged_by is not None

    def _judge(self, assignment: Assignment) -> None:
        """Has functions judge a batch, beside whatever the worker does.

        They may end the process, so that a batch's start is counted as that of one that is drawn.
        """
        alone = self._is_alone(assignment)
        if alone:
            self._finish_verdicts()
        while len(self._verdicts) >= MAX_WAITING and not self._stop.is_set():
            self._wait()
        self._store.run_dir.require_in_place()
        begun = self._ledger.hand_out(
            assignment, queue_s=time.monotonic() - self._start, started_at=datetime.now(UTC)
        )
        self._store.state.start(begun.seq, 0)
        self.blame.take(begun.seq)
        self._verdicts.append((begun, self._judging.start(begun.jobs)))
        if alone:
            self._finish_verdicts()

    def _is_alone(self, assignment: Assignment) -> bool:
        """Returns whether processes may have died of an assignment, so that it runs alone."""
        return assignment.is_last or assignment.seq in self._doubtful

    def _finish_verdicts(self) -> None:
        """Waits until functions have judged all that they were given, and everything is written."""
        while self._verdicts and not self._stop.is_set():
            self._wait()
        self.settle()

    def _take_verdicts(self) -> None:
        """Has the verdicts written that are there."""
        while self._verdicts and self._verdicts[0][1].done():
            begun, future = self._verdicts.popleft()
            result = future.result()
            self.settle()
            written = self._ledger.write(begun, result.results, result.metrics, self._by())
            self._writing = (begun, written)

    def _wait(self) -> None:
        """Waits until what was done is on record, or a while for a verdict."""
        if self._writing is None and self._verdicts:
            wait([self._verdicts[0][1]], POLL_S)
        self.settle()
        self._take_verdicts()

    def _admits(self, assignment: Assignment) -> bool:
        """Returns whether an assignment would be through by the deadline."""
        if not self._deadline.is_given:
            return True
        batch = batch_of(self._store.state.jobs(assignment.ids))
        # What is written beside a batch takes its time, and leaves little to the others.
        together = 1 + self._worker.num_following(batch.group, batch.id)
        return self._deadline.admits(batch.group, together * len(batch.jobs))

    def _begin(self, assignment: Assignment) -> Begun | None:
        """Records a batch; returns None if none of its jobs could be prepared."""
        queue_s, started_at = time.monotonic() - self._start, datetime.now(UTC)
        jobs = self._store.state.jobs(assignment.ids)
        seq = self._record(assignment, jobs)
        prepared = self._preparer.take(assignment, [stored.job for stored in jobs])
        begun = self._ledger.begin(
            assignment,
            seq,
            jobs,
            prepared,
            by=self._by(),
            queue_s=queue_s,
            started_at=started_at,
        )
        self.blame.drop(seq or 0)
        if begun is not None:
            self.blame.take(begun.seq)
        return begun

    def _by(self) -> RanBy:
        worker = self._worker
        return RanBy(worker=worker.number, node=worker.node, info=worker.info)

    def _record(self, assignment: Assignment, jobs: Sequence[StoredJob]) -> int | None:
        """Counts the start of an assignment, before anything is done that may kill the process.

        Returns:
            The batch's number; None if its jobs are prepared already, while another batch ran.
        """
        seq = assignment.seq
        if seq is not None:
            self._store.run_dir.require_in_place()
            self._store.state.start(seq, self._store.kept.num_rounds(seq))
        elif not self._preparer.is_ahead_with(assignment):
            self._store.run_dir.require_in_place()
            seq = self._store.state.begin(members_of(jobs))
        if seq is not None:
            self.blame.take(seq)
        return seq

    def _following(self, begun: Begun) -> list[tuple[int, Batch]]:
        """Has batches prepared whose texts can be written beside one, and returns them."""
        ahead = []
        count = self._worker.num_following(begun.batch.group, begun.batch.id)
        for expected in self._schedule.upcoming(begun.assignment, count):
            jobs = self._store.state.jobs(expected.ids)
            is_other = group_key(jobs[0].job) != begun.batch.group
            if expected.is_last or expected.seq in self._doubtful or is_other:
                break
            future = self._preparer.start(expected, [stored.job for stored in jobs])
            ahead.append((expected.number, jobs, future))
        following = []
        for number, jobs, future in ahead:
            outcomes = zip(jobs, future.result(), strict=True)
            if ready := [stored for stored, raised in outcomes if raised is None]:
                following.append((number, batch_of(ready)))
        return following

    def _prepare_next(self) -> None:
        """Has the batch prepared that comes next if nothing goes wrong with the current one."""
        expected = None if self._preparer.is_ahead else self._schedule.peek()
        if expected is not None and not (expected.is_last or self._is_judged(expected)):
            jobs = self._store.state.jobs(expected.ids)
            alone = expected.seq in self._doubtful
            self._preparer.start(expected, [stored.job for stored in jobs], alone=alone)

    def _generate(
        self, begun: Begun, following: Sequence[tuple[int, Batch]]
    ) -> BatchResult | Raised:
        """Runs a batch; a single job that does not fit is tried with less and less memory."""
        batch, number = begun.batch, begun.assignment.number
        kept = self._store.kept.of_batch(begun.seq, batch)
        channel = _RunChannel(
            progress=partial(self._progress, begun),
            kept=kept,
            stop=self._stop,
        )
        report(self._observer.batch_started, batch)
        start = time.monotonic()
        while True:
            outcome = self._worker.generate(
                number, batch, kept=kept.load(), channel=channel, following=following
            )
            following = ()
            if isinstance(outcome, BatchResult):
                return outcome
            if outcome.concerns is Concerns.RUN:
                raise_again(outcome)
            if len(batch.jobs) > 1:
                return outcome
            if outcome.concerns is not Concerns.MEMORY or not self._make_room():
                metrics = BatchMetrics(total_s=time.monotonic() - start)
                return BatchResult(results=(outcome.failure,), metrics=metrics)

    def _make_room(self) -> bool:
        """Has the worker continue with less memory; returns whether it can."""
        found = self._worker.make_room()
        if isinstance(found, Raised) and found.concerns is Concerns.RUN:
            raise_again(found)
        if not isinstance(found, str):
            return False
        report(self._observer.note, found)
        return True

    def _end(self, begun: Begun, outcome: BatchResult | Raised) -> None:
        """Hands results to the writer, or splits a batch that failed as a whole."""
        if isinstance(outcome, Raised):
            self.blame.drop(begun.seq)
            self._ledger.split(begun, outcome)
            return
        self.settle()
        self._head_start.begin()
        future = self._ledger.write(begun, outcome.results, outcome.metrics, self._by())
        self._writing = (begun, future)
        if begun.assignment.is_retry:
            self.settle()

    def settle(self) -> None:
        """Waits until the batch that is being written is committed, and takes account of it.

        Raises:
            StorageFullError: The disk is full.
            RunFolderError: The folder can no longer be written.
        """
        self._head_start.end()
        if self._writing is None:
            return
        (begun, future), self._writing = self._writing, None
        attempts = future.result()
        self.blame.drop(begun.seq)
        self._ledger.committed(begun, attempts)

    def _progress(self, begun: Begun, progress: Progress) -> None:
        self._head_start.end()
        report(self._observer.progress, progress)
        self._deadline.advanced(self._worker.number, begun.batch.group, progress)
        if self._stop.is_set():
            # A second signal ends the process at once, whatever the batch is doing.
            self.blame.forgive(begun.seq)
        if self._writing is not None:
            future = self._writing[1]
            if future.done() and future.exception() is None:
                self.settle()


class _RunChannel(Channel):
    """The channel of a batch, in the process of the executor.

    Args:
        progress: Takes the progress.
        kept: Keeps finished images in the run's folder.
        stop: The run's.
    """

    def __init__(
        self,
        *,
        progress: Callable[[Progress], None],
        kept: KeptOfBatch,
        stop: Stop,
    ) -> None:
        self._progress = progress
        self._kept = kept
        self._stop = stop

    def progress(self, progress: Progress) -> None:
        """Shows it, and takes account of the batch before once that is committed."""
        self._progress(progress)

    def keep(self, drawn: Drawn) -> None:
        """Writes the images to the disk."""
        self._kept.save(drawn)

    def is_stopped(self) -> bool:
        """Returns whether the run is to stop."""
        return self._stop.is_set()
