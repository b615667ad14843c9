"""One worker in a process of its own: takes orders, hosts an engine, and has news.

One thread prepares assignments, one runs batches, one encodes what they made while the next batch
runs. Knows no backend: whoever moves the messages calls `take` and `news`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from sensebatch.config import OutputConfig
from sensebatch.contract import Channel, Concerns, Drawn, Engine, Progress, Raised
from sensebatch.executor.guard import guarded
from sensebatch.executor.head_start import HeadStart
from sensebatch.executor.messages import (
    Advanced,
    Began,
    Died,
    Drew,
    Ended,
    GaveBack,
    GiveBack,
    KeptOnDisk,
    News,
    Order,
    Prepare,
    Prepared,
    RanJobs,
    Ready,
    Run,
    StopWork,
)
from sensebatch.executor.prepare import JobThreads, ReadJob
from sensebatch.executor.worker import EngineWorker
from sensebatch.jobs import (
    Batch,
    BatchResult,
    EncodedJob,
    EngineInfo,
    Failure,
    GroupKey,
    Job,
    JobResult,
)
from sensebatch.process import peak_rss_bytes
from sensebatch.store.images import encode_job_image
from sensebatch.store.phash import phash


class Outbox:
    """News that wait to be fetched, in order; the progress of a batch is only ever the latest."""

    def __init__(self) -> None:
        self._news: deque[News] = deque()
        self._changed = threading.Condition()

    def put(self, news: News) -> None:
        """Adds news; progress takes the place of progress that nobody has fetched."""
        with self._changed:
            if isinstance(news, Advanced) and self._news and isinstance(self._news[-1], Advanced):
                self._news.pop()
            self._news.append(news)
            self._changed.notify_all()

    def fetch(self, timeout_s: float) -> list[News]:
        """Returns all news, waiting until there are some; none if that takes too long."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout_s)
            found = list(self._news)
            self._news.clear()
            return found


MAX_WAIT_S = 60.0
"""The longest that a batch waits for others to be prepared whose texts are written beside it."""
MIN_ENCODERS, MAX_ENCODERS = 2, 8
"""Threads that encode where nobody said how many."""


class WorkerHost:
    """Hosts an engine for an executor in another process.

    Args:
        engine: Loaded.
        number: The worker's number in the run.
        device: What the engine computes on, for people.
        output: How images are written.
        outbox: Takes the news.
    """

    def __init__(
        self, engine: Engine, *, number: int, device: str, output: OutputConfig, outbox: Outbox
    ) -> None:
        self._worker = EngineWorker(engine, number)
        self._device = device
        self._output = output
        self._outbox = outbox
        self._lock = threading.Condition()
        self._waiting: dict[int, Run | None] = {}
        """Assignments that have not begun; with their batch once they are to be run."""
        self._stop = threading.Event()
        self._saved = threading.Semaphore(0)
        self._head_start = HeadStart()
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._jobs = JobThreads(self._worker)
        self._running = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._ending = ThreadPoolExecutor(1, thread_name_prefix="end")
        self._encoders = ThreadPoolExecutor(
            output.num_writers or _default_encoders(), thread_name_prefix="encode"
        )

    def close(self) -> None:
        """Ends the threads once they are through with what they have."""
        self._stop.set()
        self._saved.release()
        for pool in (self._preparing, self._running, self._ending, self._encoders):
            pool.shutdown(cancel_futures=True)
        self._jobs.close()

    def ready(self, groups: Iterable[GroupKey]) -> Ready:
        """Returns the news that the engine is loaded.

        Args:
            groups: Those of the jobs to come.
        """
        groups = list(groups)
        return Ready(
            node=self._worker.node,
            device=self._device,
            info=self._worker.info,
            fitting={group: self._worker.largest_batch(group) for group in groups},
            following={group: self._worker.num_following(group) for group in groups},
        )

    def take(self, order: Order) -> None:
        """Takes an order; what comes of it is news."""
        match order:
            case Prepare():
                with self._lock:
                    self._waiting[order.number] = None
                self._do(self._preparing, self._prepare, order)
            case Run():
                with self._lock:
                    self._waiting[order.number] = order
                    self._lock.notify_all()
                self._do(self._running, self._run, order)
            case GiveBack():
                self._give_back([order.number])
            case KeptOnDisk():
                self._saved.release()
            case StopWork():
                self._stop.set()
                with self._lock:
                    numbers = list(self._waiting)
                self._give_back(numbers)

    def _do(self, pool: ThreadPoolExecutor, call: Callable[..., None], *values: object) -> None:
        """Has a pool make a call; one that raises is a mistake of ours, and ends the worker."""

        def do() -> None:
            raised = guarded(partial(call, *values))
            if isinstance(raised, Raised):
                self._outbox.put(Died(reason=raised.failure.traceback))

        pool.submit(do)

    def _give_back(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            with self._lock:
                had = number in self._waiting
                self._waiting.pop(number, None)
                self._lock.notify_all()
            if had:
                # Behind the preparation of the assignment, if that is under way.
                self._do(self._preparing, self._forget, number)

    def _forget(self, number: int) -> None:
        self._worker.release(number)
        self._outbox.put(GaveBack(number=number))

    def _prepare(self, order: Prepare) -> None:
        outcomes = self._jobs.prepare(order.number, self._wanted(order))
        if len(outcomes) == len(order.jobs):
            if all(outcomes):
                # None of its jobs will be run.
                with self._lock:
                    self._waiting.pop(order.number, None)
                    self._lock.notify_all()
            self._worker.expect(order.number)
            self._outbox.put(Prepared(number=order.number, outcomes=tuple(outcomes)))

    def _wanted(self, order: Prepare) -> Iterator[ReadJob]:
        """Yields the jobs of an assignment for as long as it is wanted."""
        for job, inputs in zip(order.jobs, order.inputs, strict=True):
            with self._lock:
                if order.number not in self._waiting:
                    return
            yield job, inputs

    def _run(self, order: Run) -> None:
        number, batch = order.number, order.batch
        with self._lock:
            if self._waiting.get(number) is not order:
                return
            del self._waiting[number]
        self._outbox.put(Began(number=number))
        start = time.monotonic()
        channel = _HostChannel(number, self._outbox, self._saved, self._stop, self._head_start.end)
        outcome = self._worker.generate(
            number,
            batch,
            kept=order.kept,
            channel=channel,
            following=self._following(batch),
        )
        room = None
        if isinstance(outcome, Raised):
            outcome, room = self._make_room(batch, outcome)
        if room is None:
            self._worker.release(number)
        seconds = time.monotonic() - start
        if self._has_more:
            self._head_start.begin()
        self._do(self._ending, self._end, order, outcome, seconds, self._worker.info, room)

    @property
    def _has_more(self) -> bool:
        """Whether another batch is to be run now."""
        with self._lock:
            return any(order is not None for order in self._waiting.values())

    def _following(self, batch: Batch) -> list[tuple[int, Batch]]:
        """Returns batches whose texts can be written beside one, once they are prepared."""
        count = self._worker.num_following(batch.group, batch.id)

        def is_known() -> bool:
            """Whether there are enough of them, or nothing is being prepared."""
            orders = list(self._waiting.values())
            return len(orders) - orders.count(None) >= count or None not in orders

        with self._lock:
            if count:
                self._lock.wait_for(lambda: self._stop.is_set() or is_known(), MAX_WAIT_S)
            found = [
                (number, order.batch)
                for number, order in sorted(self._waiting.items())
                if order is not None and order.batch.group == batch.group
            ]
        return found[:count]

    def _make_room(self, batch: Batch, raised: Raised) -> tuple[Raised, str | None]:
        """Continues with less memory where a job alone did not fit; returns what was changed."""
        if raised.concerns is not Concerns.MEMORY or len(batch.jobs) > 1:
            return raised, None
        room = self._worker.make_room()
        if isinstance(room, Raised):
            return (room if room.concerns is Concerns.RUN else raised), None
        return raised, room

    def _end(
        self,
        order: Run,
        outcome: BatchResult | Raised,
        seconds: float,
        info: EngineInfo,
        room: str | None,
    ) -> None:
        said: RanJobs | Raised
        if isinstance(outcome, Raised):
            said = outcome
        else:
            batch = order.batch
            results = self._encoders.map(
                partial(self._encoded, info), batch.jobs, batch.keys, outcome.results
            )
            said = RanJobs(results=tuple(results), metrics=outcome.metrics)
        self._outbox.put(
            Ended(
                number=order.number,
                outcome=said,
                seconds=seconds,
                info=info,
                peak_rss_bytes=peak_rss_bytes(),
                room=room,
            )
        )

    def _encoded(
        self, info: EngineInfo, job: Job, key: str, result: JobResult | Failure
    ) -> EncodedJob | Failure:
        if isinstance(result, Failure):
            return result
        self._head_start.wait()
        start = time.monotonic()
        images = guarded(
            lambda: tuple(
                encode_job_image(job, key, pixels, index, output=self._output, info=info)
                for index, pixels in enumerate(result.images)
            )
        )
        if isinstance(images, Raised):
            return replace(
                images.failure, think_tokens=result.think_tokens, text_tokens=result.text_tokens
            )
        return EncodedJob(
            images=images,
            text=result.text,
            answer=result.answer,
            choice_log_probabilities=result.choice_log_probabilities,
            think_tokens=result.think_tokens,
            text_tokens=result.text_tokens,
            finish_reason=result.finish_reason,
            image_phash=tuple(map(phash, result.images)),
            encode_s=time.monotonic() - start,
        )


def _default_encoders() -> int:
    """Returns how many threads encode: a host with many cores may have several workers."""
    return min(max((os.cpu_count() or 1) // 4, MIN_ENCODERS), MAX_ENCODERS)


class _HostChannel(Channel):
    """The worker's end of a batch's channel."""

    def __init__(
        self,
        number: int,
        outbox: Outbox,
        saved: threading.Semaphore,
        stop: threading.Event,
        under_way: Callable[[], None],
    ) -> None:
        self._under_way = under_way
        self._number = number
        self._outbox = outbox
        self._saved = saved
        self._stop = stop

    def progress(self, progress: Progress) -> None:
        """Sends it, unless later progress overtakes it."""
        self._under_way()
        self._outbox.put(Advanced(number=self._number, progress=progress))

    def keep(self, drawn: Drawn) -> None:
        """Sends the images, and returns once they are on the executor's disk."""
        self._outbox.put(Drew(number=self._number, drawn=tuple(drawn)))
        self._saved.acquire()

    def is_stopped(self) -> bool:
        """Returns whether the run is to stop."""
        return self._stop.is_set()
