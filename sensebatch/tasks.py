"""What each task is: one row of facts, which the rest of the package asks.

A new task is a member of `Task`, a row of `TASKS`, a runner in `engine/tasks` and a command in
`cli`. No other module compares a task with a member of `Task`: it asks `task.spec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sensebatch.resolutions import BUCKETS_INTERLEAVE, BUCKETS_T2I, Resolution


class Task(StrEnum):
    """What a job makes; the facts are in `TASKS`."""

    T2I = "t2i"
    EDIT = "edit"
    INTERLEAVE = "interleave"
    ASK = "ask"

    @property
    def spec(self) -> TaskSpec:
        """The task's row."""
        return TASKS[self]


class Inputs(StrEnum):
    """Whether a job has input images."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


class Output(StrEnum):
    """What a job makes."""

    IMAGE = "one image"
    """Beside it the think text of a job that thinks."""
    IMAGES = "text with images"
    """As many images as the model likes, within `max_images`."""
    TEXT = "text"


class SystemPromptKind(StrEnum):
    """Which of the release's system prompts a task uses."""

    GENERATION = "generation"
    INTERLEAVE = "interleave"


class SizeRule(StrEnum):
    """Which size a job's images have unless it names one."""

    OWN = "own"
    """The task's default."""
    TARGET_PIXELS = "target pixels"
    """`target_pixels` in the aspect ratio of the first input image."""
    MODEL_LIMITS = "model limits"
    """The first input image's size, brought within the model's limits; the task's default if
    there is no input."""


class Branch(StrEnum):
    """A prompt that guidance evaluates."""

    COND = "cond"
    """The job's own: system prompt, input images and words."""
    IMG_COND = "img_cond"
    """The input images without words."""
    UNCOND = "uncond"
    """Nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceRule:
    """How guidance scales turn into branches, and at which timesteps guidance applies."""

    by_images: bool
    """Whether the input images guide on their own, with a branch and a scale (`img_cfg_scale`).
    `cfg_zero_star`, which knows no such branch, is then not available."""
    closed: bool
    """Whether both ends of `cfg_interval` belong to it. Otherwise neither does, but a lower end
    of 0 stands for every timestep."""

    def branches(self, cfg_scale: float, img_cfg_scale: float) -> tuple[Branch, ...]:
        """Returns the branches that a step may evaluate, the conditional one first."""
        if not self.by_images:
            return (Branch.COND, Branch.UNCOND) if cfg_scale > 1 else (Branch.COND,)
        if cfg_scale == 1 and img_cfg_scale == 1:
            return (Branch.COND,)
        if img_cfg_scale == 1:
            return (Branch.COND, Branch.IMG_COND)
        if img_cfg_scale == cfg_scale:
            return (Branch.COND, Branch.UNCOND)
        return (Branch.COND, Branch.IMG_COND, Branch.UNCOND)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingRule:
    """How a task draws."""

    size: SizeRule
    buckets: Mapping[str, Resolution]
    """The sizes by aspect ratio that the published checkpoints were trained with."""
    ratio: str
    """The bucket of a job that names no size and has none from an input."""
    guidance: GuidanceRule


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRule:
    """How much text a job writes."""

    limit: str
    """The sampling setting that limits it."""
    always: bool
    """Whether a job writes text even when it does not think."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRule:
    """How a task's prompt is laid out."""

    system: SystemPromptKind | None
    """The system prompt of jobs without one of their own; None if they need none."""
    numbered: bool
    """Whether several input images without any mark are introduced as `Image-1:`, `Image-2:`."""
    empty_thought: bool
    """Whether the assistant's turn begins with an empty think block if the job does not think."""
    opens_thought: bool
    """Whether it begins with `<think>` if the job thinks. Otherwise the model itself decides
    whether to think."""
    opens_image: bool
    """Whether the model is made to draw: `<img>` follows, after the thoughts of a job that thinks.
    Otherwise the model itself decides whether and when to draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """The facts about one task."""

    task: Task
    inputs: Inputs
    resizes_inputs: bool
    """Whether input images are brought to `input_max_pixels` before the model's own resize."""
    output: Output
    prompt: PromptRule
    text: TextRule
    drawing: DrawingRule | None
    """None for a task whose output is text alone."""
    thinks: bool | None
    """Whether jobs of the published checkpoints think unless they say otherwise; None if no
    job can."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of sampling settings that differ from those of other tasks."""
    runner: str
    """The module of `engine/tasks` that runs it."""

    @property
    def takes_images(self) -> bool:
        """Whether a job may have input images."""
        return self.inputs is not Inputs.NONE


_SPECS = (
    TaskSpec(
        task=Task.T2I,
        inputs=Inputs.NONE,
        resizes_inputs=False,
        output=Output.IMAGE,
        prompt=PromptRule(
            system=SystemPromptKind.GENERATION,
            numbered=False,
            empty_thought=True,
            opens_thought=True,
            opens_image=True,
        ),
        text=TextRule(limit="max_think_tokens", always=False),
        drawing=DrawingRule(
            size=SizeRule.OWN,
            buckets=BUCKETS_T2I,
            ratio="1:1",
            guidance=GuidanceRule(by_images=False, closed=True),
        ),
        thinks=False,
        runner="single_image",
    ),
    TaskSpec(
        task=Task.EDIT,
        inputs=Inputs.REQUIRED,
        resizes_inputs=True,
        output=Output.IMAGE,
        prompt=PromptRule(
            system=SystemPromptKind.GENERATION,
            numbered=True,
            empty_thought=True,
            opens_thought=True,
            opens_image=True,
        ),
        text=TextRule(limit="max_think_tokens", always=False),
        drawing=DrawingRule(
            size=SizeRule.TARGET_PIXELS,
            buckets=BUCKETS_T2I,
            ratio="1:1",
            guidance=GuidanceRule(by_images=True, closed=False),
        ),
        thinks=False,
        runner="single_image",
    ),
    TaskSpec(
        task=Task.INTERLEAVE,
        inputs=Inputs.OPTIONAL,
        resizes_inputs=False,
        output=Output.IMAGES,
        prompt=PromptRule(
            system=SystemPromptKind.INTERLEAVE,
            numbered=False,
            empty_thought=True,
            opens_thought=False,
            opens_image=False,
        ),
        text=TextRule(limit="max_new_tokens", always=True),
        drawing=DrawingRule(
            size=SizeRule.MODEL_LIMITS,
            buckets=BUCKETS_INTERLEAVE,
            ratio="16:9",
            guidance=GuidanceRule(by_images=True, closed=False),
        ),
        thinks=True,
        runner="interleave",
    ),
    TaskSpec(
        task=Task.ASK,
        inputs=Inputs.OPTIONAL,
        resizes_inputs=False,
        output=Output.TEXT,
        prompt=PromptRule(
            system=None,
            numbered=False,
            empty_thought=False,
            opens_thought=True,
            opens_image=False,
        ),
        text=TextRule(limit="max_new_tokens", always=True),
        drawing=None,
        thinks=False,
        sampling={"max_new_tokens": 1024},
        runner="ask",
    ),
)

TASKS: Mapping[Task, TaskSpec] = {spec.task: spec for spec in _SPECS}
"""The row of every task."""


def implied_task(*, has_images: bool, has_question: bool = False) -> Task:
    """Returns the task of a manifest's row that names none."""
    if has_question:
        return Task.ASK
    return Task.EDIT if has_images else Task.T2I
