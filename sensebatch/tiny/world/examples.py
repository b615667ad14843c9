"""What an example is, and text to image with and without think."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sensebatch.resolutions import Resolution
from sensebatch.tasks import Task
from sensebatch.tiny.world.captions import describe_scene, fixed_scene
from sensebatch.tiny.world.scene import Scene, Split, Thing, sample_scene

Part = str | Scene
"""Text, or a picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A job of the world with its right answer; for training, manifests and scores alike."""

    task: Task
    """Also says which system prompt the example has."""
    kind: str
    """What is asked, such as `edit-move`; scores are kept by it."""
    prompt: str
    inputs: tuple[Scene, ...] = ()
    """Input images; the prompt has no marks for them."""
    think: str | None = None
    """What stands inside the think block; None where the job does not think."""
    answer: tuple[Part, ...]
    """One picture, or for interleave text and pictures in turn."""
    changed: tuple[Thing, ...] = ()
    """Of an edit: the things, before and after, whose boxes may differ from the first input."""

    @property
    def pictures(self) -> tuple[Scene, ...]:
        """The pictures of the answer."""
        return tuple(part for part in self.answer if isinstance(part, Scene))

    @property
    def resolution(self) -> Resolution:
        """Of every picture of the answer."""
        return self.pictures[0].resolution


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
