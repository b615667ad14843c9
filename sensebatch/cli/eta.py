"""Estimates how long a run still takes, from the speed measured so far; reads no clock itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from sensebatch.jobs import Batch, GroupKey
from sensebatch.plan.batches import Plan
from sensebatch.plan.speed import Speed
from sensebatch.store.status import RunStatus


class RemainingTime:
    """Estimates the seconds a run still needs.

    Args:
        plan: The batches to come, without the interrupted ones that run before them.
    """

    def __init__(self, plan: Plan) -> None:
        self._jobs: dict[GroupKey, int] = defaultdict(int)
        self._to_come: dict[str, GroupKey] = {}
        """Groups by job id, because some jobs run more than once and some never."""
        for planned in plan.groups:
            self._jobs[planned.group] = planned.num_jobs
            for ids in planned.batches():
                self._to_come.update(dict.fromkeys(ids, planned.group))
        self._speed = Speed()

    def started(self, batch: Batch) -> None:
        """Removes the jobs of a batch from those to come."""
        for job in batch.jobs:
            self.remove(job.id)

    def remove(self, job_id: str) -> None:
        """Removes a job from those to come, if it is one of them."""
        group = self._to_come.pop(job_id, None)
        if group is not None:
            self._jobs[group] -= 1

    def put_back(self, batch: Batch) -> None:
        """Adds the jobs of a started batch to those to come again, in smaller batches."""
        self._to_come.update({job.id: batch.group for job in batch.jobs})
        self._jobs[batch.group] += len(batch.jobs)

    def measured(self, batch: Batch, seconds: float, share: float = 1.0) -> None:
        """Adds a measurement: the seconds that a batch took for a share of its images."""
        self._speed.measured(batch.group, len(batch.jobs) * share, seconds)

    def of_batch(self, batch: Batch) -> float | None:
        """Returns the seconds that a batch should take; None until one like it was measured."""
        return seconds_of(self._speed, {batch.group: len(batch.jobs)})

    def to_come(self) -> float | None:
        """Returns the seconds of all batches to come; None until such batches were measured."""
        return seconds_of(self._speed, self._jobs)


def seconds_of(speed: Speed, jobs: Mapping[GroupKey, int]) -> float | None:
    """Returns the seconds of jobs by group; None if jobs like some of them were never measured.

    So questions about images that are drawn first do not count as nothing.
    """
    if not all(speed.knows(group) for group, num_jobs in jobs.items() if num_jobs):
        return None
    return speed.of_all(jobs)


def pace(status: RunStatus) -> tuple[float | None, float | None]:
    """Returns the wall seconds that an image took lately, and those that the rest should take.

    Either is None if nothing was measured.
    """
    if not status.recent:
        return None, None
    start = min(batch.started_at for batch in status.recent)
    wall_s = (max(batch.finished_at for batch in status.recent) - start).total_seconds()
    speed = Speed()
    for batch in status.recent:
        if not batch.kept_images:
            speed.measured(batch.group, batch.jobs, batch.total_s)
    images = sum(batch.images - batch.kept_images for batch in status.recent)
    engines = [batch for batch in status.recent if not batch.group.by_function]
    workers = len({(batch.node, batch.worker) for batch in engines}) or 1
    in_engine_s = sum(batch.total_s for batch in status.recent) / workers
    left_s = seconds_of(speed, status.to_come)
    # A run also waits between batches, for example for its disk.
    if left_s is not None and in_engine_s:
        left_s *= max(wall_s / in_engine_s, 1.0) / workers
    return wall_s / images if images else None, left_s
