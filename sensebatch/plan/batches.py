"""Which jobs go through the network together. Pure: a manifest and a configuration in, ids out.

A plan holds ids and not jobs, so that a million of them stay small; it knows neither files nor
the state database.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sensebatch.config import MemoryConfig
from sensebatch.jobs import GroupKey, Job, Task, group_key
from sensebatch.plan.footprint import Load, story_tokens
from sensebatch.resolutions import PATCH_PIXELS, PixelLimits

SYSTEM_PROMPT_BYTES = 4096
"""Longest system prompt that an estimate expects of a checkpoint."""
BYTES_PER_TOKEN = 3
"""A token of ordinary ASCII text is so many bytes or more."""
LAYOUT_TOKENS = 32
"""Special tokens and words of the chat layout around a prompt."""
IMAGE_LAYOUT_TOKENS = 8
"""The same around an input image."""
_RARE = re.compile(
    "[^\u0000-\u07ff\u2000-\u206f\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]+"
)
"""No alphabet that UTF-8 has in two bytes, no punctuation, not Chinese, Japanese or Korean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """What the plan needs to know of a job."""

    id: str
    group: GroupKey
    max_images: int = 1
    """Pictures the job makes; of an interleave job, the most it may make."""
    prompt_tokens: int = 0
    """Of one prompt with its input images and the job's own system prompt; an upper estimate
    without a tokenizer."""
    text_tokens: int = 0
    """Most tokens the job decodes."""
    alone: bool = False
    """Whether the job failed before and runs in a batch of its own, away from the others."""


def plan_entry(job: Job) -> PlanEntry:
    """Returns the entry of a job that was never tried."""
    interleave = job.task is Task.INTERLEAVE
    sampling = job.sampling
    text = sampling.max_new_tokens if interleave else sampling.max_think_tokens
    return PlanEntry(
        id=job.id,
        group=group_key(job),
        max_images=sampling.max_images if interleave else 1,
        prompt_tokens=_prompt_tokens(job),
        text_tokens=text if interleave or job.think else 0,
    )


def _prompt_tokens(job: Job) -> int:
    """Returns an upper estimate."""
    text = text_tokens(job.system_prompt or "") + text_tokens(job.prompt) + LAYOUT_TOKENS
    images = 0
    for image in job.images:
        pixels = job.input_max_pixels or image.height * image.width
        pixels = min(max(pixels, PixelLimits().min_pixels), PixelLimits().base_pixels)
        images += pixels // PATCH_PIXELS**2 + IMAGE_LAYOUT_TOKENS
    return text + images


def text_tokens(text: str) -> int:
    """Returns an upper estimate of the tokens of a text as people write it, without a tokenizer.

    Digits are tokens of their own, characters of the scripts that tokenizers are trained on most
    are one at most, and others may be one for each byte.
    """
    digits = sum(map(text.count, "0123456789"))
    plain = len(text) if text.isascii() else len(text.encode("ascii", "ignore"))
    rare = [] if text.isascii() else _RARE.findall(text)
    known = len(text) - plain - sum(map(len, rare))
    others = -(-(plain - digits) // BYTES_PER_TOKEN)
    return digits + others + known + sum(len(run.encode()) for run in rare)


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
    max_images_of_job: int
    """Most pictures of one job."""
    prompt_tokens: int
    """Of the longest prompt."""
    text_tokens: int
    """Most tokens that one job decodes."""

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


def batch_size(group: GroupKey, memory: MemoryConfig, fitting: int | None = None) -> int:
    """Returns the most jobs of a group that go into one batch; at least one.

    Args:
        group: Of the jobs.
        memory: Says how many are wanted.
        fitting: How many the device's memory holds; None for any number.
    """
    most = memory.max_batch_size if fitting is None else min(memory.max_batch_size, fitting)
    if group.think and group.task is Task.T2I:
        # Thoughts are decoded together, at little more than the price of one; pictures of a batch
        # are drawn some at a time anyway. Prompts with images would take too much memory.
        return max(1, most)
    return max(1, min(memory.max_batch_image_tokens // group.resolution.image_tokens, most))


def make_plan(
    entries: Iterable[PlanEntry],
    memory: MemoryConfig,
    fitting: Callable[[GroupKey], int | None] = lambda _: None,
) -> Plan:
    """Returns the plan of jobs given in manifest order; the ids must be unique.

    Args:
        entries: The jobs.
        memory: How many jobs of a group are wanted in a batch.
        fitting: How many of them the device's memory holds; None for any number.
    """
    groups: dict[GroupKey, _Gathered] = {}
    for entry in entries:
        gathered = groups.setdefault(entry.group, _Gathered())
        (gathered.alone if entry.alone else gathered.fresh).append(entry.id)
        gathered.max_images += entry.max_images
        gathered.max_images_of_job = max(gathered.max_images_of_job, entry.max_images)
        gathered.prompt_tokens = max(gathered.prompt_tokens, entry.prompt_tokens)
        gathered.text_tokens = max(gathered.text_tokens, entry.text_tokens)
    return Plan(
        groups=tuple(
            GroupPlan(
                group=group,
                batch_size=batch_size(group, memory, fitting(group)),
                fresh=tuple(gathered.fresh),
                alone=tuple(gathered.alone),
                max_images=gathered.max_images,
                max_images_of_job=gathered.max_images_of_job,
                prompt_tokens=gathered.prompt_tokens,
                text_tokens=gathered.text_tokens,
            )
            for group, gathered in groups.items()
        )
    )


@dataclass(slots=True)
class _Gathered:
    """A group while its jobs are read."""

    fresh: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    max_images: int = 0
    max_images_of_job: int = 0
    prompt_tokens: int = 0
    text_tokens: int = 0


def group_load(plan: GroupPlan, *, system_prompt_bytes: int = SYSTEM_PROMPT_BYTES) -> Load:
    """Returns the most demanding job of a group, as the memory arithmetic wants it.

    Args:
        plan: Of the group.
        system_prompt_bytes: Of the checkpoint's longest system prompt, where it is known.
    """
    interleave = plan.group.task is Task.INTERLEAVE
    tokens = plan.group.resolution.image_tokens
    system_tokens = system_prompt_bytes // BYTES_PER_TOKEN
    return Load(
        group=plan.group,
        batch_size=max(min(plan.batch_size, len(plan.fresh)), 1),
        wanted_jobs=plan.batch_size,
        prompt_tokens=plan.prompt_tokens + system_tokens,
        system_tokens=system_tokens,
        text_tokens=plan.text_tokens,
        drawn_tokens=story_tokens(tokens, plan.max_images_of_job) if interleave else 0,
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
