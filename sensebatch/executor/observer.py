"""What a run reports while it works, and what it came to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sensebatch.config import ExecutionConfig
from sensebatch.contract import Progress, Raised, Stop
from sensebatch.executor.deadline import Deadline
from sensebatch.executor.guard import guarded
from sensebatch.jobs import Batch
from sensebatch.plan.batches import Plan
from sensebatch.store.attempts import DONE, Attempt
from sensebatch.store.state import Counts, State, StoredJob

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """What a worker in a process of its own is at."""

    number: int
    """Its number in the run, from 0."""
    node: str
    """Name of its host."""
    device: str
    """What it computes on, for people."""
    life: str
    """`ready` while it works, `dead` or `starting` until it is started again, or `given up`."""
    batch: Batch | None
    """The batch in its engine."""
    progress: Progress | None
    """Where that batch is."""


class Observer(Protocol):
    """Who watches a run; every method is called from the thread that called `execute`.

    With one engine in this process, `batch_started` and `progress` say what it is at. With workers
    in processes of their own, `worker_changed` does, for each of them.
    """

    def run_started(self, counts: Counts, plan: Plan) -> None:
        """The first batch is next; interrupted batches, counted as started, precede the plan."""

    def batch_started(self, batch: Batch) -> None:
        """A batch goes into the engine."""

    def progress(self, progress: Progress) -> None:
        """The batch in the engine advanced."""

    def worker_changed(self, worker: WorkerState) -> None:
        """A worker in a process of its own began a batch, advanced, ended one, or died."""

    def batch_split(self, batch: Batch) -> None:
        """The batch in the engine failed as a whole; its jobs are run in smaller ones."""

    def batch_finished(self, batch: Batch, attempts: Sequence[Attempt]) -> None:
        """A batch is committed; its jobs are done or failed."""

    def job_failed(self, attempt: Attempt, will_retry: bool) -> None:
        """A job failed, in a batch or before one could begin."""

    def note(self, text: str) -> None:
        """Something a person may want to know, such as a batch that was split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run came to."""

    counts: Counts
    """Jobs of the folder, at the end."""
    done: int
    """Jobs done by this process."""
    failed: int
    """Jobs that this process tried and gave up."""
    images: int
    """Images made by this process."""
    dropped: int = 0
    """Rejected images that this process removed, whichever made them."""
    stopped: bool
    """Whether a signal ended the run with jobs remaining."""
    too_many_failures: bool
    """Whether `max_failures` ended it."""
    seconds: float
    late: bool = False
    """Whether a deadline ended it with jobs remaining."""
    next_s: float | None = None
    """Seconds of the batch that would have been next, where a deadline was given and a speed is
    known."""


class Tally:
    """Counts what becomes of jobs and reports it to an observer.

    Args:
        observer: Who watches.
        execution: How often a job is tried, and how many may fail.
    """

    def __init__(self, observer: Observer, execution: ExecutionConfig) -> None:
        self._observer = observer
        self._execution = execution
        self.done = self.failed = self.images = 0

    @property
    def too_many_failures(self) -> bool:
        """Whether the run is to stop because of failed jobs."""
        limit = self._execution.max_failures
        return limit is not None and self.failed >= limit

    def summary(self, state: State, stop: Stop, seconds: float, deadline: Deadline) -> Summary:
        """Returns what the run came to.

        Args:
            state: The folder's, at the end.
            stop: The run's.
            seconds: From the start of the run.
            deadline: The run's.
        """
        counts = state.counts()
        return Summary(
            counts=counts,
            done=self.done,
            failed=self.failed,
            images=self.images,
            dropped=state.num_dropped,
            stopped=stop.is_set() and counts.remaining > 0,
            too_many_failures=self.too_many_failures and counts.remaining > 0,
            late=deadline.has_ended_run and counts.remaining > 0,
            next_s=deadline.next_s,
            seconds=seconds,
        )

    def attempted(self, stored: StoredJob, attempt: Attempt, *, is_final: bool = False) -> bool:
        """Counts an attempt that is on record; returns whether its job is to be tried again.

        Args:
            stored: The job.
            attempt: What became of it.
            is_final: Whether it is given up if it failed, however many tries it has left.
        """
        self.images += attempt.num_images
        if attempt.status == DONE:
            self.done += 1
            return False
        is_final |= attempt.is_truncated
        will_retry = not is_final and stored.tries + 1 < self._execution.max_attempts
        self.failed += not will_retry
        report(self._observer.job_failed, attempt, will_retry)
        return will_retry


def report(call: Callable[..., None], *values: object) -> None:
    """Calls a method of an observer; a display that fails must not cost a night."""
    reported = guarded(partial(call, *values))
    if isinstance(reported, Raised):
        _LOGGER.warning("the run's display failed: %s", reported.failure.message)
