"""How long a run will still take, from the speed measured so far. Knows no clock and no screen."""

from __future__ import annotations

from collections import defaultdict

from sensebatch.jobs import Batch, GroupKey
from sensebatch.plan.batches import Plan
from sensebatch.tasks import Task


def job_cost(group: GroupKey) -> float:
    """Returns what a job of a group costs, in tokens through the network for one image.

    Every job that draws nothing counts alike.
    """
    if group.drawing is None:
        return 1.0
    return float(group.image_tokens * group.drawing.num_steps * len(group.branches))


class RemainingTime:
    """Estimates the seconds a run still needs.

    Seconds by cost are measured for each task, since an interleave job writes text and several
    pictures; a task that has not run yet is taken to be as fast as the others.

    Args:
        plan: Batches that are to come; interrupted ones, which run before them, are not.
    """

    def __init__(self, plan: Plan) -> None:
        self._jobs: dict[GroupKey, int] = defaultdict(int)
        self._to_come: dict[str, GroupKey] = {}
        """By the job's id: some run more than once, and some never."""
        for planned in plan.groups:
            self._jobs[planned.group] = planned.num_jobs
            for ids in planned.batches():
                self._to_come.update(dict.fromkeys(ids, planned.group))
        self._seconds: dict[Task, float] = defaultdict(float)
        self._cost: dict[Task, float] = defaultdict(float)

    def started(self, batch: Batch) -> None:
        """Takes a batch out of what is to come."""
        for job in batch.jobs:
            self.gone(job.id)

    def gone(self, job_id: str) -> None:
        """Takes a job out of what is to come, if it was in it."""
        group = self._to_come.pop(job_id, None)
        if group is not None:
            self._jobs[group] -= 1

    def put_back(self, batch: Batch) -> None:
        """Lets the jobs of a started batch be to come again, in smaller ones."""
        self._to_come.update({job.id: batch.group for job in batch.jobs})
        self._jobs[batch.group] += len(batch.jobs)

    def measured(self, batch: Batch, seconds: float, share: float = 1.0) -> None:
        """Takes account of a batch that took so long for this share of its pictures."""
        self._seconds[batch.group.task] += seconds
        self._cost[batch.group.task] += len(batch.jobs) * job_cost(batch.group) * share

    def of_batch(self, batch: Batch) -> float | None:
        """Returns the seconds that a batch should take, or None before anything was measured."""
        speed = self._seconds_by_cost(batch.group.task)
        return None if speed is None else len(batch.jobs) * job_cost(batch.group) * speed

    def to_come(self) -> float | None:
        """Returns the seconds of all batches not started, or None before anything was measured."""
        total = 0.0
        for group, num_jobs in self._jobs.items():
            speed = self._seconds_by_cost(group.task)
            if speed is None:
                return None
            total += num_jobs * job_cost(group) * speed
        return total

    def _seconds_by_cost(self, task: Task) -> float | None:
        if self._cost[task]:
            return self._seconds[task] / self._cost[task]
        cost = sum(self._cost.values())
        return sum(self._seconds.values()) / cost if cost else None
