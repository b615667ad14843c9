"""Runs what the schedule hands out, whatever single jobs do. Never sees torch.

While a batch is in the engine, the one before it is encoded, written and committed, and the one
after it is prepared. The order of steps keeps a promise: a batch's composition is recorded before
it runs, its files are in place before it is committed, and it is committed whole. So what a kill
at any moment leaves is run in the compositions it would have been run in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial

from sensebatch.config import RunConfig
from sensebatch.contract import Channel, Concerns, Drawn, Progress, Raised, Stop, Worker
from sensebatch.errors import BatchStoppedError, RunFolderError, RunStoppedError
from sensebatch.executor.claim import claim_batches
from sensebatch.executor.deadline import Deadline
from sensebatch.executor.guard import raise_again
from sensebatch.executor.ledger import Begun, Ledger, members_of
from sensebatch.executor.levels import plan_levels
from sensebatch.executor.observer import Observer, Summary, Tally, report
from sensebatch.executor.prepare import Preparer
from sensebatch.executor.recovery import death, recover
from sensebatch.executor.schedule import Assignment, Idle, Schedule
from sensebatch.jobs import (
    BatchMetrics,
    BatchResult,
    InputImage,
    group_key,
)
from sensebatch.store.attempts import Attempt
from sensebatch.store.kept import KeptOfBatch
from sensebatch.store.state import StoredJob
from sensebatch.store.store import Store
from sensebatch.store.writer import BatchWriter, RanBy


def execute(
    *,
    store: Store,
    worker: Worker,
    config: RunConfig,
    read_image: Callable[[InputImage], bytes],
    observer: Observer,
    stop: Stop,
    deadline: Deadline | None = None,
) -> Summary:
    """Runs every job of the store that is neither done nor given up.

    Args:
        store: The run's folder, with the manifests ingested.
        worker: What generates; loaded.
        config: The run's settings.
        read_image: Returns an input image's encoded bytes; raises JobError where it cannot.
        observer: Who watches.
        stop: Once set, the run ends: between two passes of the current batch if it has another,
            with that batch on record as started and its finished images kept; else after it.
        deadline: Ends the run likewise, and before a batch that would not be through by then. With
            one, batches come in the order of their first jobs in the manifests.

    Raises:
        RunStoppedError: The disk is full, or the device failed; what was committed stays, the
            rest can be resumed.
        RunFolderError: The folder can no longer be written.
    """
    start = time.monotonic()
    deadline = Deadline() if deadline is None else deadline
    if config.execution.retry_failed:
        store.state.retry_failed()
    with (
        store.complete_log(),
        BatchWriter(store, config.output, config.execution) as writer,
        Preparer(worker, read_image) as preparer,
    ):
        run = _Run(
            store=store,
            worker=worker,
            config=config,
            preparer=preparer,
            observer=observer,
            writer=writer,
            stop=deadline.beside(stop),
            deadline=deadline,
        )
        # A batch that heeds the stop stays on record, as a kill would leave it.
        with run.forgiving():
            with suppress(BatchStoppedError):
                run.loop()
            run.settle()
    seconds = time.monotonic() - start
    store.state.settle_chains()
    return run.tally.summary(store.state.counts(), stop, seconds, deadline)


class _Run:
    """One call of `execute`."""

    def __init__(
        self,
        *,
        store: Store,
        worker: Worker,
        config: RunConfig,
        preparer: Preparer,
        observer: Observer,
        writer: BatchWriter,
        stop: Stop,
        deadline: Deadline,
    ) -> None:
        self._deadline = deadline
        self._store = store
        self._worker = worker
        self._preparer = preparer
        self._observer = observer
        self._writer = writer
        self._stop = stop
        self._start = time.monotonic()
        self._writing: tuple[Begun, Future[tuple[Attempt, ...]]] | None = None
        self._blamed: set[int] = set()
        """Numbers of batches whose start counts against them if the process is killed."""
        self.tally = Tally(observer, config.execution)
        found = recover(store, worker.largest_batch, config.memory, partial(report, observer.note))
        self._doubtful = found.doubtful
        claim_batches(store, config, worker.largest_batch, partial(report, observer.note))
        levels = plan_levels(store, config.memory, worker.largest_batch, self._deadline)
        self._schedule = Schedule(
            recorded=found.recorded,
            groups=levels.groups,
            later=levels.later,
            last=found.suspects,
        )
        self._ledger = Ledger(
            store=store,
            writer=writer,
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
        while (found := self._schedule.next()) is not Idle.FINISHED:
            if found is Idle.WAITING:
                self.settle()
                continue
            if self._stop.is_set() or self.tally.too_many_failures or not self._admits(found):
                return
            alone = found.is_last or found.seq in self._doubtful
            if alone:
                self.settle()
            begun = self._begin(found)
            if not alone:
                self._prepare_next()
            if begun is not None:
                self._end(begun, self._generate(begun))
            self._worker.release(found.number)
            if alone:
                self.settle()

    def _admits(self, assignment: Assignment) -> bool:
        """Returns whether an assignment would be through by the deadline."""
        if not self._deadline.is_given:
            return True
        (first,) = self._store.state.jobs(assignment.ids[:1])
        return self._deadline.admits(group_key(first.job), len(assignment.ids))

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
        self._blamed.discard(seq or 0)
        if begun is not None:
            self._blamed.add(begun.seq)
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
            self._blamed.add(seq)
        return seq

    def _prepare_next(self) -> None:
        """Has the batch prepared that comes next if nothing goes wrong with the current one."""
        expected = self._schedule.peek()
        if expected is not None and not expected.is_last:
            jobs = self._store.state.jobs(expected.ids)
            self._preparer.start(expected, [stored.job for stored in jobs])

    def _generate(self, begun: Begun) -> BatchResult | Raised:
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
            outcome = self._worker.generate(number, batch, kept=kept.load(), channel=channel)
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
            self._blamed.discard(begun.seq)
            self._ledger.split(begun, outcome)
            return
        self.settle()
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
        if self._writing is None:
            return
        (begun, future), self._writing = self._writing, None
        attempts = future.result()
        self._blamed.discard(begun.seq)
        self._ledger.committed(begun, attempts)

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """Blames no batch for the end of the process if the block ends as a run is meant to end."""
        try:
            yield
        except (RunStoppedError, RunFolderError, KeyboardInterrupt):
            # If it is the disk that failed, the starts stay as they are.
            with suppress(RunStoppedError, RunFolderError):
                self._forgive(*self._blamed)
            raise
        self._forgive(*self._blamed)

    def _forgive(self, *seqs: int) -> None:
        for seq in self._blamed.intersection(seqs):
            self._blamed.discard(seq)
            self._store.state.forgive(seq)

    def _progress(self, begun: Begun, progress: Progress) -> None:
        report(self._observer.progress, progress)
        self._deadline.advanced(self._worker.number, begun.batch.group, progress)
        if self._stop.is_set():
            # A second signal ends the process at once, whatever the batch is doing.
            self._forgive(begun.seq)
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
