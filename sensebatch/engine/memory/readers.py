"""Threads that read weights, several parts of a block at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

import torch

MAX_THREADS = 8
"""So many copy about as fast as one processor's memory allows."""


class Readers:
    """As many threads as the machine has cores, up to `MAX_THREADS`."""

    def __init__(self) -> None:
        count = min(MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="sensebatch-reader")
        # Otherwise each would start helpers, as many as there are cores. Torch applies the setting
        # to a thread and to all threads that are started later, which must not have it.
        before = torch.get_num_threads()
        started = Barrier(count + 1)
        for _ in range(count):
            self._threads.submit(_work_alone, started)
        started.wait()
        torch.set_num_threads(before)

    def run(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Runs tasks in parallel and returns when all are done.

        May be called from several threads; tasks are begun in the order of the calls.

        Raises:
            Exception: The first that a task raised, once all tasks of this call have ended.
        """
        pending = [self._threads.submit(task) for task in tasks]
        try:
            for task in pending:
                task.result()
        finally:
            wait([task for task in pending if not task.cancel()])

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()


def _work_alone(started: Barrier) -> None:
    torch.set_num_threads(1)
    # Torch reads the global setting again at its first use in a thread; make that use now.
    torch.get_num_threads()
    started.wait()
