"""Prepares jobs while the worker runs others: reads their input images, and has the worker decode,
resize and tokenise them, in one thread, at most one assignment ahead. Never sees the state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from sensebatch.contract import Raised, Worker
from sensebatch.executor.guard import guarded
from sensebatch.executor.schedule import Assignment
from sensebatch.jobs import InputImage, Job

Preparations = list[Raised | None]
"""Why each job cannot be run, in the order asked for; None for one that can."""


class Preparer:
    """Prepares jobs in the background; used as a context manager.

    Args:
        worker: Prepares what was read, and will run it.
        read_image: Returns an input image's encoded bytes; raises JobError where it cannot.
    """

    def __init__(self, worker: Worker, read_image: Callable[[InputImage], bytes]) -> None:
        self._worker = worker
        self._read_image = read_image
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._ahead: tuple[int, Future[Preparations]] | None = None
        self._closing = threading.Event()

    def __enter__(self) -> Preparer:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread after the job it is at."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)

    def start(self, assignment: Assignment, jobs: Sequence[Job], *, alone: bool = False) -> None:
        """Begins to prepare what is expected next; nothing while something else is waiting.

        Args:
            assignment: What is expected.
            jobs: Its jobs.
            alone: Whether it must not have the device together with another one.
        """
        if self._ahead is None:
            future = self._thread.submit(self._prepare_ahead, assignment.number, jobs, alone)
            self._ahead = (assignment.number, future)

    def is_ahead_with(self, assignment: Assignment) -> bool:
        """Returns whether an assignment's jobs were begun ahead."""
        return self._ahead is not None and self._ahead[0] == assignment.number

    def take(self, assignment: Assignment, jobs: Sequence[Job]) -> Preparations:
        """Returns what became of an assignment's jobs, begun ahead or prepared now."""
        if self._ahead is not None and self.is_ahead_with(assignment):
            future = self._ahead[1]
            self._ahead = None
        else:
            future = self._thread.submit(self._prepare_all, assignment.number, jobs)
        return future.result()

    def _prepare_ahead(self, number: int, jobs: Sequence[Job], alone: bool) -> Preparations:
        prepared = self._prepare_all(number, jobs)
        if not alone and not self._closing.is_set():
            self._worker.expect(number)
        return prepared

    def _prepare_all(self, number: int, jobs: Sequence[Job]) -> Preparations:
        # One job at a time, so that the encoded images of one alone are in memory.
        return [self._prepare(number, job) for job in jobs if not self._closing.is_set()]

    def _prepare(self, number: int, job: Job) -> Raised | None:
        inputs = read_inputs(job, self._read_image)
        if isinstance(inputs, Raised):
            return inputs
        return self._worker.prepare(number, job, inputs)


def read_inputs(job: Job, read_image: Callable[[InputImage], bytes]) -> list[bytes] | Raised:
    """Returns the encoded input images of a job, or why they cannot be read."""
    return guarded(lambda: [read_image(image) for image in job.images])
