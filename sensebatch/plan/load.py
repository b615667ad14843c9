"""The most demanding job of a group, as the arithmetic of memory and time wants it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sensebatch.jobs import GroupKey
from sensebatch.plan.batches import Demand, GroupPlan, Plan, most_of
from sensebatch.plan.passes import images_per_pass
from sensebatch.plan.tokens import SYSTEM_PROMPT_BYTES, system_tokens
from sensebatch.tasks import Branch, Output


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The most demanding job of a group, and how many jobs are in a batch."""

    group: GroupKey
    batch_size: int
    prompt_tokens: int
    """One branch's prompt with its input images; an upper estimate."""
    text_tokens: int = 0
    """Most tokens decoded after the prompt."""
    drawn_tokens: int = 0
    """Most tokens of the job's own images that are cached when its last one is drawn; see
    `interleave_tokens`."""
    wanted_jobs: int | None = None
    """Jobs of a full batch by the settings, where there are fewer; None for `batch_size`."""
    system_tokens: int = 0
    """The system turn's part of `prompt_tokens`. It is cached once more, for all jobs to begin
    with."""
    demands: tuple[tuple[Demand, int], ...] = ()
    """What the jobs take, and how many take that; empty if all count as the most demanding one."""

    @property
    def fills_one_batch(self) -> bool:
        """Whether one batch is known to hold all jobs of the group."""
        return 0 < sum(count for _, count in self.demands) <= self.batch_size

    @property
    def num_batches(self) -> int:
        """Batches that the jobs of the group fill; 1 if it is not said how many there are."""
        return max(-(-sum(count for _, count in self.demands) // self.batch_size), 1)

    @property
    def writes_first(self) -> bool:
        """Whether jobs write all of their text before anything is drawn."""
        return self.text_tokens > 0 and self.group.task.spec.output is not Output.IMAGES

    @property
    def image_tokens(self) -> int:
        """Tokens of one image; 0 for jobs that make none."""
        return self.group.image_tokens

    @property
    def longest_tokens(self) -> int:
        """Cached tokens of a job's longest branch when its last image is drawn."""
        return self.prompt_tokens + self.text_tokens + self.drawn_tokens

    @property
    def prefix_tokens(self) -> int:
        """Cached tokens of a job over all branches when its last image is drawn."""
        total = 0
        for branch in self.group.branches:
            if branch is Branch.COND:
                total += self.longest_tokens
            elif branch is Branch.IMG_COND:
                total += self.prompt_tokens + self.drawn_tokens
        return total

    @property
    def num_growing(self) -> int:
        """Branches with a prefix of the job's own; all jobs share the unconditional one."""
        return sum(branch is not Branch.UNCOND for branch in self.group.branches)

    def of_job(self, demand: Demand) -> Load:
        """Returns the load of a batch of one job of the group."""
        reads_back = self.group.task.spec.output is Output.IMAGES
        return replace(
            self,
            batch_size=1,
            prompt_tokens=demand.prompt_tokens + self.system_tokens,
            text_tokens=demand.text_tokens,
            drawn_tokens=interleave_tokens(self.image_tokens, demand.max_images)
            if reads_back
            else 0,
            demands=((demand, 1),),
        )

    def without(self, refused: Collection[Demand]) -> Load | None:
        """Returns the load of the group's other jobs; None if there are none."""
        kept = [(demand, count) for demand, count in self.demands if demand not in refused]
        if not kept:
            return None
        jobs = sum(count for _, count in kept)
        return replace(
            self.of_job(most_of(demand for demand, _ in kept)),
            batch_size=min(self.batch_size, jobs),
            demands=tuple(kept),
        )

    def jobs_per_pass(self, tokens_per_pass: int) -> int:
        """Returns how many jobs of a batch are drawn together; all of them if they draw nothing."""
        if not self.image_tokens:
            return self.batch_size
        return min(images_per_pass(self.image_tokens, tokens_per_pass), self.batch_size)


def interleave_tokens(image_tokens: int, num_images: int) -> int:
    """Returns the tokens that an interleave job's images take before the last one is drawn.

    Each begins with `<img>`. All but the last are read back, and then end with `</img>`.
    """
    return (num_images - 1) * (image_tokens + 2) + 1


def group_load(plan: GroupPlan, *, system_prompt_bytes: int = SYSTEM_PROMPT_BYTES) -> Load:
    """Returns the most demanding job of a group.

    Args:
        plan: The group's.
        system_prompt_bytes: Length of the checkpoint's longest system prompt, where it is known.
    """
    has_system = plan.group.task.spec.prompt.system is not None
    of_system = system_tokens(system_prompt_bytes) if has_system else 0
    load = Load(
        group=plan.group,
        batch_size=max(min(plan.batch_size, len(plan.fresh)), 1),
        wanted_jobs=plan.batch_size,
        prompt_tokens=of_system,
        system_tokens=of_system,
        demands=plan.demands,
    )
    found = load.without(())
    assert found is not None, "a group has jobs"
    return found


def plan_loads(plan: Plan, *, system_prompt_bytes: int) -> list[Load]:
    """Returns the most demanding job of every group of a plan; see `group_load`.

    Jobs of all levels run in the same memory, so a group that has some on several is one load.
    """
    levels: dict[GroupKey, list[GroupPlan]] = {}
    for group in plan.groups:
        levels.setdefault(group.group, []).append(group)
    return [
        group_load(_as_one(groups), system_prompt_bytes=system_prompt_bytes)
        for groups in levels.values()
    ]


def _as_one(groups: Sequence[GroupPlan]) -> GroupPlan:
    """Returns one group's levels as the first of them, with what a load needs of all of them."""
    demands: Counter[Demand] = Counter()
    for group in groups:
        demands.update(dict(group.demands))
    return replace(
        groups[0],
        # Jobs of different levels never share a batch.
        fresh=max((group.fresh for group in groups), key=len),
        demands=tuple(demands.items()),
    )
