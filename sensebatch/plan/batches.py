"""Which jobs go through the network together. Pure: jobs and settings in, ids out.

A plan holds ids rather than jobs, so that a million of them stay small. It knows neither files nor
the state database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sensebatch.config import MemoryConfig
from sensebatch.jobs import GroupKey, Job, group_key
from sensebatch.plan.tokens import prompt_tokens
from sensebatch.tasks import Output


class Demand(NamedTuple):
    """What decides, within a group, how much memory a job takes; more of it takes more."""

    prompt_tokens: int
    """One prompt with its input images and the job's own system prompt; see `tokens`."""
    text_tokens: int
    """The most tokens the job decodes."""
    max_images: int
    """Images the job makes; of an interleave job, the most it may make."""

    def covers(self, other: Demand) -> bool:
        """Returns whether a job takes at least as much as another one of its group."""
        return all(own >= its for own, its in zip(self, other, strict=True))


def most_of(demands: Iterable[Demand]) -> Demand:
    """Returns the least that covers every one of some demands, of which there is at least one."""
    return Demand(*map(max, zip(*demands, strict=True)))


def demand_of(job: Job) -> Demand:
    """Returns what a job takes."""
    return Demand(prompt_tokens(job), job.max_text_tokens, job.max_images)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """What the plan needs to know of a job."""

    id: str
    group: GroupKey
    max_images: int = 1
    """Images the job makes; of an interleave job, the most it may make."""
    prompt_tokens: int = 0
    """One prompt with its input images and the job's own system prompt; see `tokens`."""
    text_tokens: int = 0
    """Most tokens the job decodes."""
    alone: bool = False
    """Whether the job failed before and runs in a batch of its own, away from the others."""
    level: int = 0
    """How many jobs have to be done before it, one after the other; see `Job.level`."""


def plan_entry(job: Job) -> PlanEntry:
    """Returns the entry of a job that was never tried."""
    return PlanEntry(id=job.id, group=group_key(job), level=job.level, **demand_of(job)._asdict())


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
    """Images of all jobs; exact but for interleave, where it is an upper bound."""
    demands: tuple[tuple[Demand, int], ...]
    """What the jobs take, and how many take that."""
    level: int = 0
    """The level of its jobs, which run when all of the levels before are through."""
    kinds: tuple[int, ...] = ()
    """For each of `fresh`, which of the demands is its own; empty if all jobs take the same."""

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
        """Tokens of all images; an upper bound where `max_images` is one."""
        return self.max_images * self.group.image_tokens

    @property
    def images_exact(self) -> bool:
        """Whether the jobs make as many images as they may."""
        return self.group.task.spec.output is not Output.IMAGES

    def fresh_batches(self) -> Iterator[tuple[str, ...]]:
        """Yields the ids of each batch of jobs that have not failed, in the order they are run."""
        for start in range(0, len(self.fresh), self.batch_size):
            yield self.fresh[start : start + self.batch_size]

    def batches(self) -> Iterator[tuple[str, ...]]:
        """Yields the ids of each batch, in the order they are run."""
        yield from self.fresh_batches()
        for job_id in self.alone:
            yield (job_id,)

    def without(self, refused: Collection[Demand]) -> GroupPlan | None:
        """Returns the group without jobs that take too much; None if no job is left.

        Args:
            refused: What those jobs take. None of the group's jobs has failed before.
        """
        assert not self.alone
        kept = [number for number, (one, _) in enumerate(self.demands) if one not in refused]
        if not kept:
            return None
        places = {number: place for place, number in enumerate(kept)}
        kinds = self.kinds or (0,) * len(self.fresh)
        demands = tuple(self.demands[number] for number in kept)
        return replace(
            self,
            fresh=tuple(
                job_id for job_id, kind in zip(self.fresh, kinds, strict=True) if kind in places
            ),
            max_images=sum(demand.max_images * count for demand, count in demands),
            demands=demands,
            kinds=tuple(places[kind] for kind in kinds if kind in places) if len(kept) > 1 else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything there is to run, by group."""

    groups: tuple[GroupPlan, ...]
    """Level by level, in the order in which their first jobs appear in the manifest."""

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
        """Images of all jobs; an upper bound where interleave jobs are among them."""
        return sum(group.max_images for group in self.groups)


def batch_size(group: GroupKey, memory: MemoryConfig, fitting: int | None = None) -> int:
    """Returns the most jobs of a group that go into one batch; at least one.

    Args:
        group: The jobs' group.
        memory: How many are wanted.
        fitting: How many fit the device's memory; None for any number.
    """
    most = memory.max_batch_size if fitting is None else min(memory.max_batch_size, fitting)
    if not group.image_tokens or (group.think and not group.task.spec.takes_images):
        # Decoding many thoughts together costs little more than decoding one, and the images of a
        # batch are drawn a few at a time anyway. Prompts with images would take too much memory.
        return max(1, most)
    return max(1, min(memory.max_batch_image_tokens // group.image_tokens, most))


def in_manifest_order(plan: Plan, ids: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Yields the batches of all groups by where their first jobs are in the manifests.

    They are the batches of the plan, only in another order. Jobs that failed before come last.

    Args:
        plan: The plan.
        ids: Of all its jobs, in manifest order.
    """
    places = {job_id: place for place, job_id in enumerate(ids)}
    fresh = [batch for group in plan.groups for batch in group.fresh_batches()]
    yield from sorted(fresh, key=lambda batch: places[batch[0]])
    alone = [job_id for group in plan.groups for job_id in group.alone]
    for job_id in sorted(alone, key=places.__getitem__):
        yield (job_id,)


def make_plan(
    entries: Iterable[PlanEntry],
    memory: MemoryConfig,
    fitting: Callable[[GroupKey], int | None] = lambda _: None,
) -> Plan:
    """Returns the plan of jobs given in manifest order; the ids must be unique.

    Jobs of one group and different levels are groups of their own: they never share a batch.

    Args:
        entries: The jobs.
        memory: How many jobs of a group are wanted in a batch.
        fitting: How many jobs of a group fit the device's memory; None for any number.
    """
    groups: dict[tuple[int, GroupKey], _Gathered] = {}
    for entry in entries:
        groups.setdefault((entry.level, entry.group), _Gathered()).add(entry)
    return Plan(
        groups=tuple(
            GroupPlan(
                group=group,
                batch_size=batch_size(group, memory, fitting(group)),
                fresh=tuple(gathered.fresh),
                alone=tuple(gathered.alone),
                max_images=gathered.max_images,
                demands=tuple(gathered.demands.items()),
                level=level,
                kinds=tuple(gathered.kinds) if len(gathered.demands) > 1 else (),
            )
            for (level, group), gathered in sorted(groups.items(), key=lambda item: item[0][0])
        )
    )


@dataclass(slots=True)
class _Gathered:
    """A group whose jobs are still being read."""

    fresh: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    max_images: int = 0
    demands: Counter[Demand] = field(default_factory=Counter)
    numbers: dict[Demand, int] = field(default_factory=dict)
    """The place of each of the demands."""
    kinds: list[int] = field(default_factory=list)

    def add(self, entry: PlanEntry) -> None:
        """Takes one more job."""
        demand = Demand(entry.prompt_tokens, entry.text_tokens, entry.max_images)
        self.max_images += entry.max_images
        self.demands[demand] += 1
        number = self.numbers.setdefault(demand, len(self.numbers))
        if entry.alone:
            self.alone.append(entry.id)
        else:
            self.fresh.append(entry.id)
            self.kinds.append(number)
