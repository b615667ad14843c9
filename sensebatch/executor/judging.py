"""Has the user's functions judge images, in threads of this process, beside the drawing.

What a function raises, SystemExit too, is one failed job. A call cannot be ended: a run that is to
stop waits for those that are under way.
"""

from __future__ import annotations

import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sensebatch.executor.guard import guarded
from sensebatch.functions import Judge, score
from sensebatch.jobs import BatchMetrics, BatchResult, Failure, InputImage, JobResult
from sensebatch.store.state import StoredJob

MAX_THREADS = 4
"""Threads that call functions; no more than the machine has cores."""
MAX_WAITING = 64
"""Batches that may wait for a verdict; beyond them, drawing waits for the functions."""
LOG_OF_ZERO = -1000.0
"""What stands for the logarithm of 0, as rows are kept as JSON, which has no infinity: the power of
it is 0 again."""


class Judging:
    """Calls functions; used as a context manager.

    Args:
        functions: By their names.
        read_image: Returns an image's encoded bytes; raises JobError where it cannot.
        rows: Returns the rows of the log of the jobs that made the images of others, by their ids.
    """

    def __init__(
        self,
        functions: Mapping[str, Judge],
        read_image: Callable[[InputImage], bytes],
        rows: Callable[[Sequence[str]], Mapping[str, Mapping[str, Any]]],
    ) -> None:
        self._functions = functions
        self._read_image = read_image
        self._rows = rows
        self._threads = ThreadPoolExecutor(
            min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="judge"
        )

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the calls that are under way; what was not begun is left to the next run."""
        self._threads.shutdown(cancel_futures=True)

    def start(self, jobs: Sequence[StoredJob]) -> Future[BatchResult]:
        """Begins to judge; the future gives a result for each job, in their order."""
        start, lock = time.monotonic(), threading.Lock()
        results: dict[int, JobResult | Failure] = {}
        whole: Future[BatchResult] = Future()
        rows = self._rows([_subject(stored)[0] for stored in jobs])

        def judge(index: int, stored: StoredJob) -> None:
            # A function may call sys.exit; the run would wait for its verdict for ever.
            outcome = guarded(lambda: self._judged(stored, rows), BaseException)
            with lock:
                results[index] = outcome if isinstance(outcome, JobResult) else outcome.failure
                if len(results) == len(jobs):
                    metrics = BatchMetrics(total_s=time.monotonic() - start)
                    ordered = tuple(results[place] for place in range(len(jobs)))
                    whole.set_result(BatchResult(results=ordered, metrics=metrics))

        for index, stored in enumerate(jobs):
            self._threads.submit(judge, index, stored)
        return whole

    def _judged(self, stored: StoredJob, rows: Mapping[str, Mapping[str, Any]]) -> JobResult:
        """Returns the answer of a function: yes or no, with its score as the probability of yes."""
        from PIL import Image

        judged_by, (parent, _) = stored.job.judged_by, _subject(stored)
        assert judged_by is not None
        with Image.open(io.BytesIO(self._read_image(stored.job.images[0]))) as image:
            pixels = image.convert("RGB")
        function = judged_by.function
        row = _plain(rows[parent])
        found = score(function, self._functions[function], pixels, row)
        yes, no = stored.job.sampling.choices
        answer = yes if found >= 0.5 else no
        logs = tuple(math.log(share) if share else LOG_OF_ZERO for share in (found, 1 - found))
        return JobResult(text=answer, answer=answer, choice_log_probabilities=logs)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of the log whose JSON texts are read, for one function alone."""
    return {**row, **{name: json.loads(row.get(name) or "{}") for name in ("metadata", "matrix")}}


def _subject(stored: StoredJob) -> tuple[str, int]:
    """Returns whose image is judged, and which of its images."""
    subject = stored.job.images[0].output
    assert subject is not None
    return subject
