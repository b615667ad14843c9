"""How long a run will still take, from the speed measured so far. Knows no clock and no screen."""

from __future__ import annotations

from collections import defaultdict

from sensebatch.jobs import Batch, GroupKey, Task
from sensebatch.plan import Plan


def job_cost(group: GroupKey) -> float:
    """Returns what a job of a group costs, in tokens through the network for one picture."""
    return float(group.resolution.image_tokens * group.num_steps * len(group.branches))


class RemainingTime:
    """Estimates the seconds a run still needs.

    Seconds by cost are measured for each task, since an interleave job writes text and several
    pictures; a task that has not run yet is taken to be as fast as the others.

    Args:
        plan: Batches that are to come.
        num_interrupted: Jobs of interrupted batches, which run before the plan.
    """

    def __init__(self, plan: Plan, num_interrupted: int) -> None:
        self._jobs: dict[GroupKey, int] = {group.group: group.num_jobs for group in plan.groups}
        self._interrupted = num_interrupted
        self._seconds: dict[Task, float] = defaultdict(float)
        self._cost: dict[Task, float] = defaultdict(float)

    def started(self, batch: Batch) -> None:
        """Takes a batch out of what is to come."""
        num_jobs = len(batch.jobs)
        if self._interrupted:
            self._interrupted = max(0, self._interrupted - num_jobs)
        elif batch.group in self._jobs:
            self._jobs[batch.group] = max(0, self._jobs[batch.group] - num_jobs)

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
