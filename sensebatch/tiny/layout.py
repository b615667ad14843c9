"""Lays out examples as token sequences, as the engine prefills and decodes them.

Prompts come from the engine itself. What is decoded, drawn and read back after them is laid out
here in one sequence, so that one pass trains on all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from sensebatch.checkpoint.tokenizer import (
    IM_END,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    THINK_END,
    THINK_START,
)
from sensebatch.engine.model.tokenizer import Tokenizer
from sensebatch.engine.prompts import (
    Grid,
    ImageSpan,
    Prompt,
    cond_prompt,
    img_cond_prompt,
    positions,
    uncond_prompt,
)
from sensebatch.resolutions import PATCH_PIXELS, Resolution
from sensebatch.tasks import Output, SystemPromptKind, Task
from sensebatch.tiny.vocabulary import GENERATION_PROMPT, INTERLEAVE_PROMPT
from sensebatch.tiny.world.examples import Example
from sensebatch.tiny.world.scene import Scene, pick


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """An image to be denoised after a prefix of its sequence."""

    scene: Scene
    prefix: int
    """How many tokens of the sequence it sees; the last is its `<img>`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """An example, or the part of it that one guidance branch sees."""

    token_ids: tuple[int, ...]
    positions: np.ndarray
    """int64 `[3, tokens]`, rows t, h, w."""
    images: tuple[tuple[ImageSpan, Scene], ...]
    """Images that the understanding path reads."""
    learned: tuple[int, ...]
    """Indices of the tokens that the network must choose itself."""
    slots: tuple[Slot, ...]
    faint: Scene | None = None
    """The scene that the first image is blended with."""
    answers: tuple[int, ...] = ()
    """How many of the learned tokens each answer to a question has; none in other tasks."""
    forks: tuple[int, ...] = ()
    """Where each of several questions begins, if they share the tokens before the first of them.
    They do not see one another."""


def system_prompt(task: Task) -> str:
    """Returns a task's system prompt in the training of the embedded checkpoint."""
    match task.spec.prompt.system:
        case SystemPromptKind.INTERLEAVE:
            return INTERLEAVE_PROMPT
        case SystemPromptKind.GENERATION:
            return GENERATION_PROMPT
        case None:
            return ""


def token_grid(resolution: Resolution) -> Grid:
    """Returns an image's size in tokens."""
    return Grid(resolution.height // PATCH_PIXELS, resolution.width // PATCH_PIXELS)


@dataclass
class _Writer:
    """Appends tokens and images to a prompt."""

    tokenizer: Tokenizer
    ids: list[int]
    images: list[tuple[ImageSpan, Scene]]
    learned: list[int] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    @classmethod
    def after(cls, tokenizer: Tokenizer, prompt: Prompt, inputs: tuple[Scene, ...]) -> _Writer:
        images = list(zip(prompt.images, inputs[: len(prompt.images)], strict=True))
        return cls(tokenizer=tokenizer, ids=list(prompt.token_ids), images=images)

    def say(self, *pieces: str, special: bool = False, learned: bool = True) -> None:
        """Appends text, or one special token."""
        start = len(self.ids)
        for piece in pieces:
            self.ids += (
                [self.tokenizer.token_id(piece)] if special else self.tokenizer.encode(piece)
            )
        if learned:
            self.learned += range(start, len(self.ids))

    def draw(self, scene: Scene) -> None:
        """Denoises an image after the last `<img>`."""
        self.slots.append(Slot(scene=scene, prefix=len(self.ids)))

    def read_back(self, scene: Scene) -> None:
        """Appends a finished image and its `</img>`."""
        grid = token_grid(scene.resolution)
        self.images.append((ImageSpan(len(self.ids), grid), scene))
        self.ids += [self.tokenizer.token_id(IMG_CONTEXT)] * (grid.height * grid.width)
        self.ids.append(self.tokenizer.token_id(IMG_END))

    def finish(self) -> Sequence:
        """Returns the sequence."""
        spans = tuple(span for span, _ in self.images)
        prompt = Prompt(token_ids=tuple(self.ids), images=spans)
        return Sequence(
            token_ids=prompt.token_ids,
            positions=positions(prompt),
            images=tuple(self.images),
            learned=tuple(self.learned),
            slots=tuple(self.slots),
        )


def _grids(example: Example) -> list[Grid]:
    return [token_grid(scene.resolution) for scene in example.inputs]


def cond_sequence(tokenizer: Tokenizer, example: Example) -> Sequence:
    """Returns an example as the conditional branch sees it, with all text to be decoded."""
    interleave = example.task.spec.output is Output.IMAGES
    prompt = cond_prompt(
        tokenizer,
        task=example.task,
        system=system_prompt(example.task),
        prompt=example.prompt,
        grids=_grids(example),
        think=example.think is not None,
    )
    writer = _Writer.after(tokenizer, prompt, example.inputs)
    if example.task.spec.output is Output.TEXT:
        writer.say(example.text)
        writer.say(IM_END, special=True)
        return replace(writer.finish(), faint=example.faint, answers=(len(writer.learned),))
    if example.think is not None:
        if interleave:
            writer.say(THINK_START, special=True)
            writer.say("\n")
        writer.say(f"{example.think}\n")
        writer.say(THINK_END, special=True)
        writer.say("\n\n", learned=interleave)
        if not interleave:
            writer.say(IMG_START, special=True, learned=False)
    if not interleave:
        writer.draw(example.images[0])
        return writer.finish()
    for part in example.answer:
        if isinstance(part, str):
            writer.say(part)
            continue
        writer.say(IMG_START, special=True)
        writer.draw(part)
        writer.read_back(part)
    writer.say(IM_END, special=True)
    return writer.finish()


def asked_sequence(tokenizer: Tokenizer, examples: list[Example]) -> Sequence:
    """Returns questions about the same images as one sequence, in which the images are read once.

    Every question has the positions and sees the tokens that it has on its own.
    """
    first = cond_sequence(tokenizer, examples[0])
    shared = first.images[-1][0].end + 1
    ids, learned = list(first.token_ids), list(first.learned)
    answers, forks = [len(learned)], [shared]
    kept, after = [first.positions], int(first.positions[0, shared - 1]) + 1
    for example in examples[1:]:
        asked = _asked_ids(tokenizer, example)
        said = [*tokenizer.encode(example.text), tokenizer.token_id(IM_END)]
        assert asked[:shared] == first.token_ids[:shared]
        forks.append(len(ids))
        ids += (*asked[shared:], *said)
        learned += range(len(ids) - len(said), len(ids))
        answers.append(len(said))
        own = np.zeros((3, len(ids) - forks[-1]), dtype=np.int64)
        own[0] = np.arange(after, after + own.shape[1])
        kept.append(own)
    return replace(
        first,
        token_ids=tuple(ids),
        positions=np.concatenate(kept, axis=1),
        learned=tuple(learned),
        answers=tuple(answers),
        forks=tuple(forks),
    )


def _asked_ids(tokenizer: Tokenizer, example: Example) -> tuple[int, ...]:
    return cond_prompt(
        tokenizer,
        task=example.task,
        system=system_prompt(example.task),
        prompt=example.prompt,
        grids=_grids(example),
        think=False,
    ).token_ids


def img_cond_sequence(tokenizer: Tokenizer, example: Example) -> Sequence:
    """Returns an edit or interleave example as the image-conditional branch sees it."""
    prompt = img_cond_prompt(tokenizer, task=example.task, grids=_grids(example))
    writer = _Writer.after(tokenizer, prompt, example.inputs)
    if example.task.spec.output is Output.IMAGE:
        writer.draw(example.images[0])
        return writer.finish()
    for number, scene in enumerate(example.images, start=1):
        writer.say(IMG_START, special=True, learned=False)
        writer.draw(scene)
        if number < len(example.images):
            writer.read_back(scene)
    return writer.finish()


def uncond_sequence(tokenizer: Tokenizer, example: Example, rng: np.random.Generator) -> Sequence:
    """Returns one image of an example as the unconditional branch sees it: after an empty turn."""
    writer = _Writer.after(tokenizer, uncond_prompt(tokenizer), ())
    writer.draw(pick(rng, example.images))
    return writer.finish()
