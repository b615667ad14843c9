"""How fast jobs are, measured by the jobs before them. Reads no clock itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from sensebatch.jobs import GroupKey
from sensebatch.tasks import Task


def job_cost(group: GroupKey) -> float:
    """Returns what a job of a group costs: the tokens that go through the network for one image.

    All jobs that draw nothing cost the same.
    """
    if group.drawing is None:
        return 1.0
    return group.image_tokens * group.drawing.cost


class Speed:
    """Measures the seconds that jobs take, in proportion to their cost.

    Each task is measured on its own, because an interleave job writes text and several images. A
    task that has not run yet is assumed to be as fast as the others.
    """

    def __init__(self) -> None:
        self._seconds: dict[Task, float] = defaultdict(float)
        self._cost: dict[Task, float] = defaultdict(float)

    def measured(self, group: GroupKey, num_jobs: float, seconds: float) -> None:
        """Adds a measurement: the seconds that some jobs of a group took together."""
        self._seconds[group.task] += seconds
        self._cost[group.task] += num_jobs * job_cost(group)

    def of(self, group: GroupKey, num_jobs: int) -> float | None:
        """Returns the seconds that jobs should take; None until anything has been measured."""
        if self._cost[group.task]:
            by_cost = self._seconds[group.task] / self._cost[group.task]
        elif cost := sum(self._cost.values()):
            by_cost = sum(self._seconds.values()) / cost
        else:
            return None
        return num_jobs * job_cost(group) * by_cost

    def knows(self, group: GroupKey) -> bool:
        """Returns whether jobs like those of a group were measured: of its task, or of another one
        whose cost is counted alike. What draws says nothing about what only reads and writes."""
        draws = group.drawing is not None
        return any((task.spec.drawing is not None) == draws for task in self._cost)

    def of_task(self, group: GroupKey, num_jobs: int) -> float | None:
        """Returns what `of` does; None as well where the group's task has not run yet."""
        return self.of(group, num_jobs) if self._cost[group.task] else None

    def of_all(self, jobs: Mapping[GroupKey, int]) -> float | None:
        """Returns the seconds that jobs of several groups should take; None as for `of`."""
        total = 0.0
        for group, num_jobs in jobs.items():
            seconds = self.of(group, num_jobs)
            if seconds is None:
                return None
            total += seconds
        return total
