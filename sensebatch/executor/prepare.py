"""Prepares jobs beside the engine's work: reads their input images and has the engine decode,
resize and tokenise them, in one thread, at most one batch ahead. Never sees the state database.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from sensebatch.contract import Engine, Prepared
from sensebatch.executor.guard import Raised, guarded
from sensebatch.jobs import InputImage
from sensebatch.store.state import StoredJob

Preparations = list[Prepared | Raised]
"""What became of each job, in the order asked for."""


class Preparer:
    """Prepares jobs in the background; used as a context manager.

    Args:
        engine: Prepares what was read.
        read_image: Returns an input image's encoded bytes; raises JobError where it cannot.
    """

    def __init__(self, engine: Engine, read_image: Callable[[InputImage], bytes]) -> None:
        self._engine = engine
        self._read_image = read_image
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._ahead: tuple[list[str], Future[Preparations]] | None = None
        self._closing = threading.Event()

    def __enter__(self) -> Preparer:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread behind the job it is at."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)

    def start(self, jobs: Sequence[StoredJob]) -> None:
        """Begins to prepare the jobs that are expected next; nothing while others are waiting."""
        if self._ahead is None:
            self._ahead = (_ids(jobs), self._thread.submit(self._prepare_all, jobs))

    def take(self, jobs: Sequence[StoredJob]) -> Preparations:
        """Returns jobs prepared: those begun ahead if it is them, else prepared now.

        Raises:
            RunStoppedError: As the engine did: no other job would fare better.
            RunFolderError: Likewise.
        """
        if self._ahead is not None and self._ahead[0] == _ids(jobs):
            future = self._ahead[1]
            self._ahead = None
        else:
            future = self._thread.submit(self._prepare_all, jobs)
        return future.result()

    def _prepare_all(self, jobs: Sequence[StoredJob]) -> Preparations:
        prepared: Preparations = []
        for stored in jobs:
            if self._closing.is_set():
                break
            prepared.append(guarded(partial(self._prepare, stored)))
        return prepared

    def _prepare(self, stored: StoredJob) -> Prepared:
        inputs = [self._read_image(image) for image in stored.job.images]
        return self._engine.prepare(stored.job, inputs)


def _ids(jobs: Sequence[StoredJob]) -> list[str]:
    return [stored.job.id for stored in jobs]
