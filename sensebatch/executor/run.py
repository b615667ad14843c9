"""Runs a plan: one batch after the other, whatever single jobs do. Never sees torch.

While a batch is in the engine, the one before it is encoded, written and committed, and the one
behind it is prepared. The order of steps keeps a promise: a batch's composition is recorded
before it runs, its files are in place before it is committed, and it is committed whole. So what
is left after a kill at any moment is run in the compositions it would have been run in.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from sensebatch.config import RunConfig
from sensebatch.contract import Checkpoints, Engine, Prepared, Progress
from sensebatch.errors import BatchStoppedError
from sensebatch.executor.guard import Raised, guarded
from sensebatch.executor.prepare import Preparer
from sensebatch.jobs import (
    Batch,
    BatchMetrics,
    BatchResult,
    InputImage,
    JobResult,
    batch_id,
    group_key,
)
from sensebatch.plan.batches import Plan, batch_size, make_plan
from sensebatch.store.attempts import DONE, Attempt, Failure
from sensebatch.store.state import Counts, StoredJob
from sensebatch.store.store import Store
from sensebatch.store.writer import BatchWriter, RanBatch, without_exceptions

_LOGGER = logging.getLogger(__name__)


class Observer(Protocol):
    """Who watches a run; every method is called from the thread that called `execute`."""

    def run_started(self, counts: Counts, plan: Plan) -> None:
        """The run begins; interrupted batches, counted as started, come before the plan."""

    def batch_started(self, batch: Batch) -> None:
        """A batch goes into the engine."""

    def progress(self, progress: Progress) -> None:
        """The batch in the engine went on."""

    def batch_split(self, batch: Batch) -> None:
        """The batch in the engine failed as a whole; its jobs are run in smaller ones."""

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:
        """A batch is committed; its jobs are done or failed."""

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed, in a batch or before one could begin."""

    def note(self, text: str) -> None:
        """Something a person may want to know, such as a batch that was split."""


class Stop(Protocol):
    """What a signal sets; `threading.Event` is one."""

    def is_set(self) -> bool:
        """Returns whether the run is to stop where the current batch can; true once it is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run came to."""

    counts: Counts
    """Of the folder, at the end."""
    done: int
    """Jobs done by this process."""
    failed: int
    """Jobs that this process tried and gave up."""
    images: int
    """Pictures made by this process."""
    stopped: bool
    """Whether a signal ended the run with jobs remaining."""
    too_many_failures: bool
    """Whether `max_failures` ended it."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Jobs to be run together: planned, or a batch whose composition is on record."""

    ids: tuple[str, ...]
    seq: int | None = None
    group: int | None = None
    """Number of the group in the plan."""


def plan_remaining(store: Store, engine: Engine, config: RunConfig) -> Plan:
    """Returns the plan of all jobs to be run that are in no interrupted batch."""
    return make_plan(store.state.entries(), config.memory, engine.largest_batch)


def execute(
    *,
    store: Store,
    engine: Engine,
    config: RunConfig,
    read_image: Callable[[InputImage], bytes],
    observer: Observer,
    stop: Stop,
) -> Summary:
    """Runs every job of the store that is neither done nor given up.

    Args:
        store: The run's folder, with the manifests ingested.
        engine: What generates; loaded.
        config: The run's settings.
        read_image: Returns an input image's encoded bytes; raises JobError where it cannot.
        observer: Who watches.
        stop: Once set, the run ends: where the current batch heeds it, between two passes, with
            that batch on record as started and its finished pictures kept; else behind it.

    Raises:
        RunStoppedError: The disk is full, or the device failed; what was committed stays, the
            rest can be resumed.
        RunFolderError: The folder cannot be written any more.
    """
    if config.execution.retry_failed:
        store.state.retry_failed()
    max_attempts = config.execution.max_attempts
    with (
        store.complete_log(),
        BatchWriter(store, engine.info, config.output, max_attempts=max_attempts) as writer,
        Preparer(engine, read_image) as preparer,
    ):
        run = _Run(store, engine, config, preparer, observer, writer, stop)
        # A batch that heeds the stop is left as a kill would leave it.
        with suppress(BatchStoppedError):
            for piece in run.pieces():
                if stop.is_set() or run.too_many_failures:
                    break
                run.run_piece(piece)
        run.settle()
    return run.summary(stopped=stop.is_set())


class _Run:
    """The state of one call of `execute`."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        config: RunConfig,
        preparer: Preparer,
        observer: Observer,
        writer: BatchWriter,
        stop: Stop,
    ) -> None:
        self._store = store
        self._engine = engine
        self._config = config
        self._preparer = preparer
        self._observer = observer
        self._writer = writer
        self._stop = stop
        self._start = time.monotonic()
        self._writing: tuple[RanBatch, Future[tuple[Attempt, ...]]] | None = None
        self._parts: deque[_Piece] = deque()
        self._retries: deque[str] = deque()
        self._next: _Piece | None = None
        self._done = self._failed = self._images = 0
        self._interrupted = self._recorded_pieces()
        self._plan = plan_remaining(store, engine, config)
        self._tell(partial(observer.run_started, store.state.counts(), self._plan))

    @property
    def too_many_failures(self) -> bool:
        """Whether the run is to stop because of failed jobs."""
        limit = self._config.execution.max_failures
        return limit is not None and self._failed >= limit

    def summary(self, *, stopped: bool) -> Summary:
        """Returns what the run came to."""
        counts = self._store.state.counts()
        return Summary(
            counts=counts,
            done=self._done,
            failed=self._failed,
            images=self._images,
            stopped=stopped and counts.remaining > 0,
            too_many_failures=self.too_many_failures and counts.remaining > 0,
            seconds=time.monotonic() - self._start,
        )

    def pieces(self) -> Iterator[_Piece]:
        """Yields what is to be run: interrupted batches as they were, then the plan by groups.

        Behind a piece come the parts it was split into, behind a group its failed jobs, alone.
        """
        planned = self._planned()
        self._next = next(planned, None)
        while self._next is not None:
            piece, self._next = self._next, next(planned, None)
            yield piece
            while self._parts:
                yield self._parts.popleft()
            if self._next is None or self._next.group != piece.group:
                if self._writing is not None and self._writing[0].has_failures:
                    self.settle()
                yield from self._again()
        self.settle()
        yield from self._again()

    def _planned(self) -> Iterator[_Piece]:
        """Yields the pieces that are known beforehand."""
        yield from self._interrupted
        for number, group in enumerate(self._plan.groups):
            for ids in group.batches():
                yield _Piece(ids=ids, group=number)

    def _again(self) -> Iterator[_Piece]:
        while self._retries:
            yield _Piece(ids=(self._retries.popleft(),))
            self.settle()

    def _recorded_pieces(self) -> list[_Piece]:
        """Returns interrupted batches; one that is now too large is planned anew."""
        pieces, too_large = [], []
        for started in self._store.state.started_batches():
            group = group_key(self._store.state.jobs(started.ids[:1])[0].job)
            fitting = self._engine.largest_batch(group)
            if len(started.members) > batch_size(group, self._config.memory, fitting):
                too_large.append(started.seq)
                self._note(f"batch of {len(started.members)} jobs is planned anew")
            else:
                pieces.append(_Piece(ids=started.ids, seq=started.seq))
        self._store.state.drop_batches(too_large)
        return pieces

    def run_piece(self, piece: _Piece) -> None:
        """Runs jobs as one batch, or splits them into the pieces that come next."""
        queue_s, started_at = time.monotonic() - self._start, datetime.now(UTC)
        jobs, prepared, seq = self._begin(piece, queue_s)
        self._prepare_next()
        if not jobs:
            return
        keys = tuple(stored.key for stored in jobs)
        members = tuple(stored.job for stored in jobs)
        batch = Batch(id=batch_id(keys), group=group_key(members[0]), jobs=members, keys=keys)
        checkpoints = self._store.kept.of_batch(seq, batch)
        self._tell(partial(self._observer.batch_started, batch))
        start = time.monotonic()
        result = self._generate(batch, prepared, checkpoints)
        if isinstance(result, Raised) and len(jobs) > 1:
            self._split(seq, jobs, result)
            self._tell(partial(self._observer.batch_split, batch))
            return
        if isinstance(result, Raised):
            metrics = BatchMetrics(total_s=time.monotonic() - start)
            results: tuple[JobResult | Failure, ...] = (result.failure,)
        else:
            metrics, results = result.metrics, without_exceptions(result.results)
        self._submit(
            RanBatch(
                seq=seq,
                batch=batch,
                jobs=tuple(jobs),
                results=results,
                metrics=metrics,
                info=self._engine.info,
                queue_s=queue_s,
                started_at=started_at,
            )
        )

    def _generate(
        self, batch: Batch, prepared: Sequence[Prepared], checkpoints: Checkpoints
    ) -> BatchResult | Raised:
        """Runs a batch; one job that does not fit is tried with less and less memory."""
        while True:
            result = guarded(
                lambda: _checked(
                    batch,
                    self._engine.generate(
                        batch,
                        prepared,
                        checkpoints=checkpoints,
                        progress=self._progress,
                        stop=self._stop.is_set,
                    ),
                )
            )
            if not (isinstance(result, Raised) and result.out_of_memory and len(batch.jobs) == 1):
                return result
            said = guarded(self._engine.make_room)
            if not isinstance(said, str):
                return result
            self._note(said)

    def _begin(self, piece: _Piece, queue_s: float) -> tuple[list[StoredJob], list[Prepared], int]:
        """Records the composition of a batch; jobs that cannot be prepared fail outside it."""
        ready: list[StoredJob] = []
        prepared: list[Prepared] = []
        failed: list[tuple[StoredJob, Failure]] = []
        jobs = self._store.state.jobs(piece.ids)
        for stored, result in zip(jobs, self._preparer.take(jobs), strict=True):
            if isinstance(result, Raised):
                failed.append((stored, result.failure))
            else:
                ready.append(stored)
                prepared.append(result)
        if piece.seq is not None and not failed:
            return ready, prepared, piece.seq
        members = [(stored.job.id, stored.key) for stored in ready]
        seq, attempts = self._writer.fail_early(
            members, failed, replacing=piece.seq, queue_s=queue_s
        )
        self._account([stored for stored, _ in failed], attempts)
        return ready, prepared, seq

    def _prepare_next(self) -> None:
        """Has the batch prepared that follows if nothing goes wrong with the present one."""
        expected = self._parts[0] if self._parts else self._next
        if expected is not None:
            self._preparer.start(self._store.state.jobs(expected.ids))

    def _split(self, seq: int, jobs: Sequence[StoredJob], raised: Raised) -> None:
        """Halves a batch that did not fit; takes one that failed otherwise apart."""
        members = [(stored.job.id, stored.key) for stored in jobs]
        size = -(-len(members) // 2) if raised.out_of_memory else 1
        parts = [members[start : start + size] for start in range(0, len(members), size)]
        why = "does not fit" if raised.out_of_memory else f"failed ({raised.failure.type})"
        self._note(f"batch of {len(members)} jobs {why}: run as {len(parts)} batches")
        for part, number in zip(parts, self._store.state.split(seq, parts), strict=True):
            self._parts.append(_Piece(ids=tuple(job_id for job_id, _ in part), seq=number))

    def _submit(self, ran: RanBatch) -> None:
        """Hands a batch to the writer once the one before is committed."""
        self.settle()
        self._writing = (ran, self._writer.submit(ran))

    def settle(self) -> None:
        """Waits until the batch that is being written is committed, and takes account of it.

        Raises:
            StorageFullError: The disk is full.
            RunFolderError: The folder cannot be written any more.
        """
        if self._writing is None:
            return
        (ran, future), self._writing = self._writing, None
        attempts = future.result()
        self._tell(partial(self._observer.batch_finished, ran.batch, attempts))
        self._account(ran.jobs, attempts)

    def _progress(self, progress: Progress) -> None:
        self._tell(partial(self._observer.progress, progress))
        if self._writing is not None:
            future = self._writing[1]
            if future.done() and future.exception() is None:
                self.settle()

    def _account(self, jobs: Sequence[StoredJob], attempts: Sequence[Attempt]) -> None:
        for stored, attempt in zip(jobs, attempts, strict=True):
            self._images += attempt.num_images
            if attempt.status == DONE:
                self._done += 1
                continue
            will_retry = stored.tries + 1 < self._config.execution.max_attempts
            self._failed += not will_retry
            if will_retry:
                self._retries.append(stored.job.id)
            self._tell(partial(self._observer.job_failed, attempt, will_retry))

    def _note(self, text: str) -> None:
        self._tell(partial(self._observer.note, text))

    def _tell(self, call: Callable[[], None]) -> None:
        """Tells the observer; a display that fails is no reason to lose a night."""
        told = guarded(call)
        if isinstance(told, Raised):
            _LOGGER.warning("the run's display failed: %s", told.failure.message)


def _checked(batch: Batch, result: BatchResult) -> BatchResult:
    if len(result.results) != len(batch.jobs):
        raise ValueError(f"expected {len(batch.jobs)} results, found {len(result.results)}")
    return result
