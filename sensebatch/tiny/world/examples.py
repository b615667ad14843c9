"""What an example is, and examples of text to image with and without thinking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from sensebatch.tiny.world.captions import describe_scene, fixed_scene
from sensebatch.tiny.world.scene import Scene, Split, Thing, sample_scene

Part = str | Scene
"""Text, or an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A job of the world with its right answer, for training, manifests and scores."""

    task: Task
    """The task, which also decides the system prompt."""
    kind: str
    """The kind of question, such as `edit-move`; scores are kept by kind."""
    prompt: str
    inputs: tuple[Scene, ...] = ()
    """Input images, for which the prompt has no marks."""
    faint: Scene | None = None
    """In a question, a scene that the first input is blended with, so that it shows neither."""
    think: str | None = None
    """The text of the think block; None if the job does not think."""
    answer: tuple[Part, ...]
    """One image, text and images in turn for interleave, or one text for a question."""
    changed: tuple[Thing, ...] = ()
    """In an edit, the things before and after it whose boxes may differ from the first input."""

    @property
    def text(self) -> str:
        """The text of the answer without its images."""
        return "".join(part for part in self.answer if isinstance(part, str))

    @property
    def images(self) -> tuple[Scene, ...]:
        """The images of the answer."""
        return tuple(part for part in self.answer if isinstance(part, Scene))

    @property
    def resolution(self) -> Resolution:
        """The resolution of every image, of the answer and of the inputs."""
        return (self.images or self.inputs)[0].resolution


def text_to_image(
    rng: np.random.Generator, split: Split, resolution: Resolution, *, think: bool
) -> Example:
    """Returns a t2i example; its think text names size, colour, shape and place of each thing."""
    scene = sample_scene(rng, split, resolution)
    return Example(
        task=Task.T2I,
        kind="t2i-think" if think else "t2i",
        prompt=describe_scene(rng, scene),
        think=fixed_scene(scene) if think else None,
        answer=(scene,),
    )
