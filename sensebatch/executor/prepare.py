"""Prepares jobs while the worker runs others: reads their input images, and has the worker decode,
resize and tokenise them. Never sees the state.

One thread reads images in the order of the jobs, which is how they lie in files; several prepare
what was read.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from sensebatch.contract import Raised, Worker
from sensebatch.executor.guard import guarded
from sensebatch.executor.schedule import Assignment
from sensebatch.jobs import InputImage, Job

MAX_THREADS = 4
"""How many jobs are prepared at a time at most: enough for a GPU that answers 50 questions about
images a second."""
PIXELS_OF_A_THREAD = 1 << 22
"""Pixels of input images that are decoded at a time, by each thread: those of 2048x2048. Larger
images wait until they have the memory to themselves."""

Preparations = list[Raised | None]
"""Why each job cannot be run, in the order asked for; None for one that can."""
ReadJob = tuple[Job, Sequence[bytes] | Raised]
"""A job with its encoded input images, or why they cannot be read."""


class JobThreads:
    """Threads in which a worker prepares jobs, several at a time.

    Args:
        worker: Prepares them.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # The other cores compute, encode and read.
        count = max(min(MAX_THREADS, (os.cpu_count() or 1) // 2), 1)
        self._room = count * PIXELS_OF_A_THREAD
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="prepare-job")

    def prepare(self, number: int, jobs: Iterable[ReadJob]) -> Preparations:
        """Returns what became of an assignment's jobs.

        Args:
            number: The assignment's.
            jobs: Are taken one by one, once there is room for their images.
        """
        outcomes: list[Future[Raised | None]] = []
        waiting: deque[tuple[Future[Raised | None], int]] = deque()
        held = 0
        for place, (job, inputs) in enumerate(jobs):
            pixels = sum(image.height * image.width for image in job.images)
            while waiting and held + pixels > self._room:
                oldest, freed = waiting.popleft()
                oldest.result()
                held -= freed
            outcome = self._threads.submit(self._prepare, number, place, job, inputs)
            outcomes.append(outcome)
            waiting.append((outcome, pixels))
            held += pixels
        return [outcome.result() for outcome in outcomes]

    def _prepare(
        self, number: int, place: int, job: Job, inputs: Sequence[bytes] | Raised
    ) -> Raised | None:
        if isinstance(inputs, Raised):
            return inputs
        return self._worker.prepare(number, place, job, inputs)

    def close(self) -> None:
        """Ends the threads after the jobs they are at."""
        self._threads.shutdown()


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
        self._jobs = JobThreads(worker)
        self._ahead: dict[int, Future[Preparations]] = {}
        """What was begun ahead, by the numbers of assignments."""
        self._closing = threading.Event()

    def __enter__(self) -> Preparer:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads after the jobs they are at."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        self._jobs.close()

    def start(
        self, assignment: Assignment, jobs: Sequence[Job], *, alone: bool = False
    ) -> Future[Preparations]:
        """Begins to prepare what is expected to come, unless it has begun; returns the outcome.

        Args:
            assignment: What is expected.
            jobs: Its jobs.
            alone: Whether it must not have the device together with another one.
        """
        number = assignment.number
        if number not in self._ahead:
            self._ahead[number] = self._thread.submit(self._prepare_ahead, number, jobs, alone)
        return self._ahead[number]

    @property
    def is_ahead(self) -> bool:
        """Whether anything was begun that has not been taken."""
        return bool(self._ahead)

    def is_ahead_with(self, assignment: Assignment) -> bool:
        """Returns whether an assignment's jobs were begun ahead."""
        return assignment.number in self._ahead

    def take(self, assignment: Assignment, jobs: Sequence[Job]) -> Preparations:
        """Returns what became of an assignment's jobs, begun ahead or prepared now."""
        number = assignment.number
        future = self._ahead.pop(number, None)
        if future is None:
            future = self._thread.submit(self._prepare_all, number, jobs)
        return future.result()

    def _prepare_ahead(self, number: int, jobs: Sequence[Job], alone: bool) -> Preparations:
        prepared = self._prepare_all(number, jobs)
        if not alone and not self._closing.is_set():
            self._worker.expect(number)
        return prepared

    def _prepare_all(self, number: int, jobs: Sequence[Job]) -> Preparations:
        return self._jobs.prepare(number, self._read(jobs))

    def _read(self, jobs: Sequence[Job]) -> Iterator[ReadJob]:
        # One by one, so that no more encoded images are in memory than are decoded.
        for job in jobs:
            if self._closing.is_set():
                return
            yield job, read_inputs(job, self._read_image)


def read_inputs(job: Job, read_image: Callable[[InputImage], bytes]) -> list[bytes] | Raised:
    """Returns the encoded input images of a job, or why they cannot be read."""
    return guarded(lambda: [read_image(image) for image in job.images])
