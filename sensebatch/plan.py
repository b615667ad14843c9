"""Which jobs go through the network together. Pure: a manifest and a configuration in, ids out.

A plan holds ids and not jobs, so that a million of them stay small; it knows neither files nor
the state database.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sensebatch.config import MemoryConfig
from sensebatch.jobs import GroupKey, Job, Task, group_key


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """What the plan needs to know of a job."""

    id: str
    group: GroupKey
    max_images: int = 1
    """Pictures the job makes; of an interleave job, the most it may make."""
    alone: bool = False
    """Whether the job failed before and runs in a batch of its own, away from the others."""


def plan_entry(job: Job) -> PlanEntry:
    """Returns the entry of a job that was never tried."""
    interleave = job.task is Task.INTERLEAVE
    max_images = job.sampling.max_images if interleave else 1
    return PlanEntry(id=job.id, group=group_key(job), max_images=max_images)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """The jobs of one group and how they are cut into batches."""

    group: GroupKey
    batch_size: int
    """Most jobs in one batch of this group."""
    fresh: tuple[str, ...]
    """Ids in manifest order, cut into batches of `batch_size`; the last may be smaller."""
    alone: tuple[str, ...]
    """Ids of jobs that failed before; one batch each, after the others."""
    max_images: int
    """Pictures of all jobs; exact but for interleave, where it is an upper bound."""

    @property
    def num_jobs(self) -> int:
        """Jobs in the group."""
        return len(self.fresh) + len(self.alone)

    @property
    def num_batches(self) -> int:
        """Batches the group is cut into."""
        return -(-len(self.fresh) // self.batch_size) + len(self.alone)

    @property
    def max_image_tokens(self) -> int:
        """Image tokens of all pictures; an upper bound where `max_images` is one."""
        return self.max_images * self.group.resolution.image_tokens

    def batches(self) -> Iterator[tuple[str, ...]]:
        """Yields the ids of each batch, in the order they are run."""
        for start in range(0, len(self.fresh), self.batch_size):
            yield self.fresh[start : start + self.batch_size]
        for job_id in self.alone:
            yield (job_id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything there is to run, by group."""

    groups: tuple[GroupPlan, ...]
    """In the order in which their first jobs appear in the manifest."""

    @property
    def num_jobs(self) -> int:
        """Jobs of all groups."""
        return sum(group.num_jobs for group in self.groups)

    @property
    def num_batches(self) -> int:
        """Batches of all groups."""
        return sum(group.num_batches for group in self.groups)

    @property
    def max_images(self) -> int:
        """Pictures of all jobs; an upper bound where interleave jobs are among them."""
        return sum(group.max_images for group in self.groups)


def batch_size(group: GroupKey, memory: MemoryConfig) -> int:
    """Returns the most jobs of a group that go into one batch; at least one."""
    fitting = memory.max_batch_image_tokens // group.resolution.image_tokens
    return max(1, min(fitting, memory.max_batch_size))


def make_plan(entries: Iterable[PlanEntry], memory: MemoryConfig) -> Plan:
    """Returns the plan of jobs given in manifest order; the ids must be unique."""
    fresh: dict[GroupKey, list[str]] = {}
    alone: dict[GroupKey, list[str]] = {}
    max_images: dict[GroupKey, int] = {}
    for entry in entries:
        if entry.group not in max_images:
            fresh[entry.group], alone[entry.group], max_images[entry.group] = [], [], 0
        (alone if entry.alone else fresh)[entry.group].append(entry.id)
        max_images[entry.group] += entry.max_images
    return Plan(
        groups=tuple(
            GroupPlan(
                group=group,
                batch_size=batch_size(group, memory),
                fresh=tuple(fresh[group]),
                alone=tuple(alone[group]),
                max_images=images,
            )
            for group, images in max_images.items()
        )
    )


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Returns the plan as `sensebatch plan --json` prints it.

    `images` counts the pictures to be made. How many an interleave job draws is known only
    afterwards; it counts with the most it may draw, and `images_exact` is then false.
    """
    return {
        "jobs": plan.num_jobs,
        "images": plan.max_images,
        "images_exact": all(group.group.task is not Task.INTERLEAVE for group in plan.groups),
        "batches": plan.num_batches,
        "groups": [_group_summary(group) for group in plan.groups],
    }


def _group_summary(plan: GroupPlan) -> dict[str, Any]:
    group = plan.group
    return {
        "task": group.task.value,
        "width": group.resolution.width,
        "height": group.resolution.height,
        "num_steps": group.num_steps,
        "timestep_shift": group.timestep_shift,
        "think": group.think,
        "branches": list(group.branches),
        "jobs": plan.num_jobs,
        "batches": plan.num_batches,
        "batch_size": plan.batch_size,
        "images": plan.max_images,
        "images_exact": group.task is not Task.INTERLEAVE,
        "image_tokens": plan.max_image_tokens,
    }
