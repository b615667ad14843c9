"""What is on record of a run's batches, and what became of them: for one worker as for many.

A batch's composition is recorded before it runs, its files are in place before it is committed,
and it is committed whole. Only the process that holds the run's folder has a ledger.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime

from sensebatch.contract import Concerns, Raised
from sensebatch.executor.deadline import Deadline
from sensebatch.executor.guard import raise_again
from sensebatch.executor.observer import Observer, Tally, report
from sensebatch.executor.prepare import Preparations
from sensebatch.executor.schedule import Assignment, Recorded, Schedule
from sensebatch.jobs import (
    Batch,
    BatchMetrics,
    EncodedJob,
    Failure,
    JobResult,
    batch_id,
    group_key,
)
from sensebatch.store.attempts import Attempt
from sensebatch.store.state import StoredJob
from sensebatch.store.store import Store
from sensebatch.store.writer import BatchWriter, RanBatch, RanBy
from sensebatch.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """An assignment whose batch is on record."""

    assignment: Assignment
    seq: int
    batch: Batch
    jobs: tuple[StoredJob, ...]
    queue_s: float
    started_at: datetime

    @property
    def members(self) -> list[tuple[str, str]]:
        """(id, key) of each job, in the batch's order."""
        return members_of(self.jobs)


class Ledger:
    """Records batches, and what became of them.

    Args:
        store: The run's folder.
        writer: Brings results to the disk.
        schedule: Says what runs next.
        observer: Who watches.
        tally: Counts what becomes of jobs.
        deadline: Learns how long batches take.
    """

    def __init__(
        self,
        *,
        store: Store,
        writer: BatchWriter,
        schedule: Schedule,
        observer: Observer,
        tally: Tally,
        deadline: Deadline,
    ) -> None:
        self._deadline = deadline
        self._store = store
        self._writer = writer
        self._schedule = schedule
        self._observer = observer
        self._tally = tally

    def hand_out(self, assignment: Assignment, *, queue_s: float, started_at: datetime) -> Begun:
        """Records the batch of an assignment that goes to another process, whose death is noticed.

        Args:
            assignment: In flight.
            queue_s: Seconds from the start of the run.
            started_at: Now.
        """
        jobs = tuple(self._store.state.jobs(assignment.ids))
        seq = assignment.seq
        if seq is None:
            seq = self._store.state.begin(members_of(jobs), starts=0)
        return Begun(
            assignment=assignment,
            seq=seq,
            batch=batch_of(jobs),
            jobs=jobs,
            queue_s=queue_s,
            started_at=started_at,
        )

    def narrow(self, begun: Begun, prepared: Preparations, by: RanBy) -> Begun | None:
        """Records a batch again without the jobs that could not be prepared; see `begin`."""
        return self.begin(
            begun.assignment,
            begun.seq,
            begun.jobs,
            prepared,
            by=by,
            queue_s=begun.queue_s,
            started_at=begun.started_at,
        )

    def begin(
        self,
        assignment: Assignment,
        seq: int | None,
        jobs: Sequence[StoredJob],
        prepared: Preparations,
        *,
        by: RanBy,
        queue_s: float,
        started_at: datetime,
    ) -> Begun | None:
        """Records a batch without the jobs that could not be prepared; returns None if none could.

        Those jobs are on record as failed before the batch begins.

        Args:
            assignment: In flight.
            seq: The batch's number; None if its composition is still to be recorded.
            jobs: Those of the assignment.
            prepared: Why each of them cannot be run.
            by: The worker that prepared them.
            queue_s: Seconds from the start of the run.
            started_at: When the assignment was handed out.

        Raises:
            RunStoppedError: What a job met concerns the run.
            RunFolderError: Likewise.
        """
        ready: list[StoredJob] = []
        failed: list[tuple[StoredJob, Failure]] = []
        for stored, raised in zip(jobs, prepared, strict=True):
            if raised is None:
                ready.append(stored)
            elif raised.concerns is Concerns.RUN:
                raise_again(raised)
            else:
                failed.append((stored, raised.failure))
        if seq is None or failed:
            seq, attempts = self._writer.fail_early(
                members_of(ready), failed, by=by, replacing=seq, queue_s=queue_s
            )
            self.account([stored for stored, _ in failed], attempts)
        if not ready:
            self._schedule.done(assignment)
            return None
        return Begun(
            assignment=assignment,
            seq=seq,
            batch=batch_of(ready),
            jobs=tuple(ready),
            queue_s=queue_s,
            started_at=started_at,
        )

    def write(
        self,
        begun: Begun,
        results: Sequence[JobResult | EncodedJob | Failure],
        metrics: BatchMetrics,
        by: RanBy,
    ) -> Future[tuple[Attempt, ...]]:
        """Hands results to the writer; see `BatchWriter.submit`."""
        ran = RanBatch(
            seq=begun.seq,
            batch=begun.batch,
            jobs=begun.jobs,
            results=results,
            metrics=metrics,
            by=by,
            queue_s=begun.queue_s,
            started_at=begun.started_at,
        )
        if ran.has_failures:
            self._schedule.hold(begun.assignment)
        if not begun.batch.group.by_function:
            self._deadline.ran(by.worker, begun.batch.group, len(begun.jobs), metrics)
        ended = time.monotonic()
        future = self._writer.submit(ran)
        future.add_done_callback(lambda _: self._deadline.wrote(time.monotonic() - ended))
        return future

    def committed(self, begun: Begun, attempts: Sequence[Attempt]) -> None:
        """Takes account of a batch that is committed."""
        report(self._observer.batch_finished, begun.batch, attempts)
        self.account(begun.jobs, attempts)
        self._schedule.done(begun.assignment)

    def split(self, begun: Begun, raised: Raised) -> None:
        """Halves a batch that did not fit; takes one that failed otherwise apart."""
        does_not_fit = raised.concerns is Concerns.MEMORY
        size = -(-len(begun.jobs) // 2) if does_not_fit else 1
        why = "does not fit" if does_not_fit else f"failed ({raised.failure.type})"
        parts = self._split(begun, size, is_suspect=False)
        report(
            self._observer.note,
            f"batch of {counted(len(begun.jobs), 'job')} {why}: run as "
            f"{counted(len(parts), 'batch')}",
        )
        report(self._observer.batch_split, begun.batch)

    def take_apart(self, begun: Begun, deaths: int) -> list[Recorded]:
        """Has the jobs of a batch that workers died of run one by one; returns their batches."""
        report(
            self._observer.note,
            f"{counted(deaths, 'worker')} died during a batch of "
            f"{counted(len(begun.jobs), 'job')}: run one by one",
        )
        parts = self._split(begun, 1, is_suspect=True)
        report(self._observer.batch_split, begun.batch)
        return parts

    def _split(self, begun: Begun, size: int, *, is_suspect: bool) -> list[Recorded]:
        all_members = begun.members
        parts = [all_members[start : start + size] for start in range(0, len(all_members), size)]
        seqs = self._store.state.split(begun.seq, parts, is_suspect=is_suspect)
        recorded = [
            (seq, tuple(job_id for job_id, _ in part))
            for seq, part in zip(seqs, parts, strict=True)
        ]
        self._schedule.split(begun.assignment, recorded)
        return recorded

    def give_up(self, batch: Recorded, by: RanBy, death: Failure, *, queue_s: float = 0.0) -> None:
        """Fails the job of a batch that processes died of when it ran alone."""
        seq, ids = batch
        (stored,) = self._store.state.jobs(ids)
        _, (attempt,) = self._writer.fail_early(
            [], [(stored, death)], by=by, replacing=seq, queue_s=queue_s, is_final=True
        )
        self._tally.attempted(stored, attempt, is_final=True)

    def account(self, jobs: Sequence[StoredJob], attempts: Sequence[Attempt]) -> None:
        """Counts attempts that are on record, and queues the jobs that are to be tried again."""
        for stored, attempt in zip(jobs, attempts, strict=True):
            if self._tally.attempted(stored, attempt):
                self._schedule.retry(stored.job.id)


def members_of(jobs: Sequence[StoredJob]) -> list[tuple[str, str]]:
    """Returns (id, key) of each job."""
    return [(stored.job.id, stored.key) for stored in jobs]


def batch_of(jobs: Sequence[StoredJob]) -> Batch:
    """Returns jobs of one group as a batch."""
    keys = tuple(stored.key for stored in jobs)
    return Batch(
        id=batch_id(keys),
        group=group_key(jobs[0].job),
        jobs=tuple(stored.job for stored in jobs),
        keys=keys,
    )
