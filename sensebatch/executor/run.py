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
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from sensebatch.config import RunConfig
from sensebatch.contract import Channel, Concerns, Drawn, Progress, Raised, Stop, Worker
from sensebatch.errors import BatchStoppedError, RunFolderError, RunStoppedError
from sensebatch.executor.claim import claim_batches
from sensebatch.executor.guard import raise_again
from sensebatch.executor.observer import Observer, Summary, Tally, report
from sensebatch.executor.prepare import Preparer
from sensebatch.executor.recovery import death, recover
from sensebatch.executor.schedule import Assignment, Idle, Recorded, Schedule
from sensebatch.jobs import (
    Batch,
    BatchMetrics,
    BatchResult,
    Failure,
    InputImage,
    batch_id,
    group_key,
)
from sensebatch.plan.batches import make_plan
from sensebatch.store.attempts import Attempt
from sensebatch.store.kept import KeptOfBatch
from sensebatch.store.state import StoredJob
from sensebatch.store.store import Store
from sensebatch.store.writer import BatchWriter, RanBatch


def execute(
    *,
    store: Store,
    worker: Worker,
    config: RunConfig,
    read_image: Callable[[InputImage], bytes],
    observer: Observer,
    stop: Stop,
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

    Raises:
        RunStoppedError: The disk is full, or the device failed; what was committed stays, the
            rest can be resumed.
        RunFolderError: The folder can no longer be written.
    """
    start = time.monotonic()
    if config.execution.retry_failed:
        store.state.retry_failed()
    max_attempts = config.execution.max_attempts
    with (
        store.complete_log(),
        BatchWriter(store, worker, config.output, max_attempts=max_attempts) as writer,
        Preparer(worker, read_image) as preparer,
    ):
        run = _Run(
            store=store,
            worker=worker,
            config=config,
            preparer=preparer,
            observer=observer,
            writer=writer,
            stop=stop,
        )
        # A batch that heeds the stop stays on record, as a kill would leave it.
        with run.forgiving():
            with suppress(BatchStoppedError):
                run.loop()
            run.settle()
    counts, tally = store.state.counts(), run.tally
    return Summary(
        counts=counts,
        done=tally.done,
        failed=tally.failed,
        images=tally.images,
        stopped=stop.is_set() and counts.remaining > 0,
        too_many_failures=tally.too_many_failures and counts.remaining > 0,
        seconds=time.monotonic() - start,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """An assignment whose batch is on record."""

    assignment: Assignment
    seq: int
    batch: Batch
    jobs: tuple[StoredJob, ...]
    queue_s: float
    started_at: datetime


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
    ) -> None:
        self._store = store
        self._worker = worker
        self._preparer = preparer
        self._observer = observer
        self._writer = writer
        self._stop = stop
        self._start = time.monotonic()
        self._writing: tuple[_Begun, Future[tuple[Attempt, ...]]] | None = None
        self._blamed: set[int] = set()
        """Numbers of batches whose start counts against them if the process is killed."""
        self.tally = Tally(observer, config.execution)
        found = recover(store, worker, config.memory, partial(report, observer.note))
        self._doubtful = found.doubtful
        claim_batches(store, config, worker.largest_batch, partial(report, observer.note))
        plan = make_plan(store.state.entries(), config.memory, worker.largest_batch)
        self._schedule = Schedule(
            recorded=found.recorded,
            groups=(group.batches() for group in plan.groups),
            last=found.suspects,
        )
        report(observer.run_started, store.state.counts(), plan)
        self._give_up(found.given_up)

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
            if self._stop.is_set() or self.tally.too_many_failures:
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

    def _begin(self, assignment: Assignment) -> _Begun | None:
        """Records a batch; returns None if none of its jobs could be prepared.

        Jobs that could not are on record as failed before the batch begins.
        """
        queue_s, started_at = time.monotonic() - self._start, datetime.now(UTC)
        ready: list[StoredJob] = []
        failed: list[tuple[StoredJob, Failure]] = []
        jobs = self._store.state.jobs(assignment.ids)
        seq = self._record(assignment, jobs)
        prepared = self._preparer.take(assignment, [stored.job for stored in jobs])
        for stored, raised in zip(jobs, prepared, strict=True):
            if raised is None:
                ready.append(stored)
            elif raised.concerns is Concerns.RUN:
                raise_again(raised)
            else:
                failed.append((stored, raised.failure))
        if seq is None or failed:
            self._blamed.discard(seq or 0)
            seq, attempts = self._writer.fail_early(
                _members(ready), failed, replacing=seq, queue_s=queue_s
            )
            self._account([stored for stored, _ in failed], attempts)
        if not ready:
            self._schedule.done(assignment)
            return None
        self._blamed.add(seq)
        return _Begun(
            assignment=assignment,
            seq=seq,
            batch=_batch_of(ready),
            jobs=tuple(ready),
            queue_s=queue_s,
            started_at=started_at,
        )

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
            seq = self._store.state.begin(_members(jobs))
        if seq is not None:
            self._blamed.add(seq)
        return seq

    def _prepare_next(self) -> None:
        """Has the batch prepared that comes next if nothing goes wrong with the current one."""
        expected = self._schedule.peek()
        if expected is not None and not expected.is_last:
            jobs = self._store.state.jobs(expected.ids)
            self._preparer.start(expected, [stored.job for stored in jobs])

    def _generate(self, begun: _Begun) -> BatchResult | Raised:
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

    def _end(self, begun: _Begun, outcome: BatchResult | Raised) -> None:
        """Hands results to the writer, or splits a batch that failed as a whole."""
        if isinstance(outcome, Raised):
            self._split(begun, outcome)
            return
        self.settle()
        ran = RanBatch(
            seq=begun.seq,
            batch=begun.batch,
            jobs=begun.jobs,
            results=outcome.results,
            metrics=outcome.metrics,
            worker=self._worker.number,
            node=self._worker.node,
            info=self._worker.info,
            queue_s=begun.queue_s,
            started_at=begun.started_at,
        )
        if ran.has_failures:
            self._schedule.hold(begun.assignment)
        self._writing = (begun, self._writer.submit(ran))
        if begun.assignment.is_retry:
            self.settle()

    def _split(self, begun: _Begun, raised: Raised) -> None:
        """Halves a batch that did not fit; takes one that failed otherwise apart."""
        members = _members(begun.jobs)
        does_not_fit = raised.concerns is Concerns.MEMORY
        size = -(-len(members) // 2) if does_not_fit else 1
        parts = [members[start : start + size] for start in range(0, len(members), size)]
        why = "does not fit" if does_not_fit else f"failed ({raised.failure.type})"
        report(
            self._observer.note,
            f"batch of {len(members)} jobs {why}: run as {len(parts)} batches",
        )
        seqs = self._store.state.split(begun.seq, parts)
        self._blamed.discard(begun.seq)
        self._schedule.split(
            begun.assignment,
            [
                (seq, tuple(job_id for job_id, _ in part))
                for seq, part in zip(seqs, parts, strict=True)
            ],
        )
        report(self._observer.batch_split, begun.batch)

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
        report(self._observer.batch_finished, begun.batch, attempts)
        self._account(begun.jobs, attempts)
        self._schedule.done(begun.assignment)

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

    def _progress(self, begun: _Begun, progress: Progress) -> None:
        report(self._observer.progress, progress)
        if self._stop.is_set():
            # A second signal ends the process at once, whatever the batch is doing.
            self._forgive(begun.seq)
        if self._writing is not None:
            future = self._writing[1]
            if future.done() and future.exception() is None:
                self.settle()

    def _give_up(self, batches: Sequence[Recorded]) -> None:
        """Fails the jobs that processes died of when they ran alone."""
        for seq, ids in batches:
            (stored,) = self._store.state.jobs(ids)
            _, (attempt,) = self._writer.fail_early(
                [], [(stored, death())], replacing=seq, queue_s=0.0, is_final=True
            )
            self.tally.attempted(stored, attempt, is_final=True)

    def _account(self, jobs: Sequence[StoredJob], attempts: Sequence[Attempt]) -> None:
        for stored, attempt in zip(jobs, attempts, strict=True):
            if self.tally.attempted(stored, attempt):
                self._schedule.retry(stored.job.id)


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


def _members(jobs: Sequence[StoredJob]) -> list[tuple[str, str]]:
    return [(stored.job.id, stored.key) for stored in jobs]


def _batch_of(jobs: Sequence[StoredJob]) -> Batch:
    keys = tuple(stored.key for stored in jobs)
    return Batch(
        id=batch_id(keys),
        group=group_key(jobs[0].job),
        jobs=tuple(stored.job for stored in jobs),
        keys=keys,
    )
