"""When a run is to be over, and whether what comes next would be through by then.

How long a batch takes is known from those before it. Nothing is left out for what comes after it:
the first batch that would not end in time ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from sensebatch.contract import Phase, Progress, Stop
from sensebatch.jobs import BatchMetrics, GroupKey
from sensebatch.plan.batches import Plan, PlanEntry, in_manifest_order
from sensebatch.plan.speed import Speed
from sensebatch.plan.tail import handed_out
from sensebatch.store.status import PastBatch


class Deadline:
    """Decides what a run may still begin, and stops it before a pass that would take too long.

    Args:
        at: Seconds since the epoch; None for no deadline.
        clock: Returns the time.
        earlier: Batches of an earlier process in the same folder, to know a speed from the start.
    """

    def __init__(
        self,
        at: float | None = None,
        *,
        clock: Callable[[], float] = time.time,
        earlier: Iterable[PastBatch] = (),
    ) -> None:
        self._at = at
        self._clock = clock
        self._speed = Speed()
        self._write_s = 0.0
        self._passes: dict[int, _Pass] = {}
        self._is_over = self._is_closed = False
        self.next_s: float | None = None
        """Seconds of the batch that was not begun, as far as a speed is known."""
        for batch in earlier:
            if not batch.kept_images:
                self._speed.measured(batch.group, batch.jobs, batch.total_s)

    @property
    def is_given(self) -> bool:
        """Whether there is one."""
        return self._at is not None

    @property
    def has_ended_run(self) -> bool:
        """Whether it kept something from being begun, or stopped it."""
        return self._is_over or self._is_closed

    def is_set(self) -> bool:
        """Returns whether the run is to stop where its batches can; stays true once it is.

        It is if another pass such as those that are being drawn would not end in time.
        """
        if not self._is_over and self._at is not None:
            pass_s = max((one.seconds for one in self._passes.values()), default=0.0)
            self._is_over = self._clock() + pass_s >= self._at
        return self._is_over

    def admits(self, group: GroupKey, num_jobs: int, *, queued_s: float = 0.0) -> bool:
        """Returns whether a batch that begins now, or after others, would end in time.

        After one that would not although it began at once, none is admitted.

        Args:
            group: The batch's.
            num_jobs: Jobs of the batch.
            queued_s: Seconds until the batch would begin.
        """
        if self._at is None:
            return True
        self.next_s = self._speed.of(group, num_jobs)
        needed_s = queued_s + (self.next_s or 0.0) + self._write_s
        is_late = self._clock() + needed_s >= self._at
        self._is_closed = self._is_closed or (is_late and not queued_s)
        return not (is_late or self._is_closed)

    def seconds(self, group: GroupKey, num_jobs: int) -> float:
        """Returns what a batch should take; 0 until anything has been measured."""
        return self._speed.of(group, num_jobs) or 0.0

    def measured_seconds(self, group: GroupKey, num_jobs: int) -> float | None:
        """Returns what a batch should take by others of its task; None if there were none."""
        return self._speed.of_task(group, num_jobs)

    def ran(self, worker: int, group: GroupKey, num_jobs: int, metrics: BatchMetrics) -> None:
        """Takes what a batch took in a worker's engine; one with kept images says nothing."""
        self._passes.pop(worker, None)
        if not metrics.num_kept_images:
            self._speed.measured(group, num_jobs, metrics.total_s)

    def wrote(self, seconds: float) -> None:
        """Takes the seconds from the end of a batch in the engine to its commit."""
        self._write_s = max(self._write_s, seconds)

    def advanced(self, worker: int, group: GroupKey, progress: Progress) -> None:
        """Takes the progress of a worker's batch."""
        if self._at is None:
            return
        if progress.phase is not Phase.DENOISE or group.drawing is None:
            self._passes.pop(worker, None)
        elif worker in self._passes:
            self._passes[worker].advanced(self._clock(), progress.step)
        else:
            now = self._clock()
            self._passes[worker] = _Pass(group.drawing.num_steps, now, progress.step)

    def groups(
        self, plan: Plan, entries: Callable[[], Iterable[PlanEntry]], num_workers: int = 1
    ) -> Iterable[Iterable[tuple[str, ...]]]:
        """Returns a plan's batches group by group; with a deadline, all by their first jobs.

        Args:
            plan: The plan.
            entries: Returns its jobs, in manifest order.
            num_workers: How many workers are handed them; see `tail.handed_out`.
        """
        if self._at is None:
            return handed_out(plan, num_workers)
        return [in_manifest_order(plan, (entry.id for entry in entries()))]

    def beside(self, stop: Stop) -> Stop:
        """Returns a stop that is set as soon as the deadline or another stop is."""
        return _Either(stop, self)


class _Pass:
    """Measures the seconds of a pass by its steps.

    Args:
        num_steps: Of the pass.
        now: When the first step was seen.
        step: Its number in the batch.
    """

    def __init__(self, num_steps: int, now: float, step: int) -> None:
        self._num_steps = num_steps
        self._start, self._first = now, step
        self.seconds = 0.0

    def advanced(self, now: float, step: int) -> None:
        if step > self._first:
            self.seconds = self._num_steps * (now - self._start) / (step - self._first)


class _Either:
    def __init__(self, *stops: Stop) -> None:
        self._stops = stops

    def is_set(self) -> bool:
        return any(stop.is_set() for stop in self._stops)
