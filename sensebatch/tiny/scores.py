"""Scores answers: the rates that docs/tiny.md reports. Takes images and text, returns numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sensebatch.jobs import IMAGE_MARK
from sensebatch.tiny.world.captions import read_things
from sensebatch.tiny.world.checker import (
    Reading,
    read_image,
    score_things,
    things_psnr,
    unchanged_psnr,
)
from sensebatch.tiny.world.draw import draw_uint8
from sensebatch.tiny.world.examples import Example

MIN_PSNR = 25.0
"""PSNR in dB from which a region counts as unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to an example."""

    images: tuple[np.ndarray, ...]
    """uint8 `[height, width, 3]`."""
    text: str | None


@dataclass(slots=True)
class Scores:
    """Rates by name, each with its own number of cases."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, is_right: bool) -> None:
        """Counts a case."""
        self.right[name] += is_right
        self.asked[name] += 1

    def rate(self, name: str) -> float:
        """Returns the share of cases that were right."""
        return self.right[name] / self.asked[name]

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Returns each rate and its number of cases by name."""
        return {
            name: {"rate": round(self.rate(name), 4), "cases": self.asked[name]}
            for name in self.asked
        }

    def line(self) -> str:
        """Returns the rates in one line, in percent."""
        return " ".join(f"{name}={100 * self.rate(name):.1f}" for name in self.asked)


def score(kind: str, examples: Sequence[Example], answers: Sequence[Answer]) -> Scores:
    """Returns the rates of one kind of `evaluate.KINDS`."""
    scores = Scores()
    for example, answer in zip(examples, answers, strict=True):
        images, text = answer.images, answer.text
        if kind in ("ask", "caption"):
            _score_answer(scores, example, text or "")
        elif kind == "edit":
            _score_edit(scores, example, images[0])
        elif kind == "interleave":
            _score_story(scores, example, images, text or "")
        else:
            reading = _score_scene(scores, example, images[0])
            if kind == "think":
                _score_think(scores, example, reading, text or "")
    return scores


def _score_answer(scores: Scores, example: Example, text: str) -> None:
    if example.kind == "ask-caption":
        said, (scene,) = Counter(read_things(text)), example.inputs
        scores.add("things", said == Counter(scene.things))
        scores.add("exact", text == example.text)
        return
    is_right = text == example.text
    scores.add("right", is_right)
    scores.add(f"right:{example.kind.removeprefix('ask-')}", is_right)


def _score_scene(scores: Scores, example: Example, image: np.ndarray) -> Reading:
    (scene,) = example.images
    reading = read_image(image)
    for thing in score_things(reading, scene):
        scores.add("colour", thing.colour)
        scores.add("shape", thing.shape)
        scores.add("place", thing.place)
        scores.add("size", thing.size)
    exact = reading.shows(scene)
    if len(scene.things) == 1:
        (thing,) = score_things(reading, scene)
        all_right = thing.colour and thing.shape and thing.place
        scores.add("single", all_right and len(reading.things) + reading.unclear == 1)
    scores.add("exact", exact)
    scores.add("background", reading.background == scene.background)
    return reading


def _score_think(scores: Scores, example: Example, reading: Reading, text: str) -> None:
    said = Counter(read_things(text))
    agrees = bool(said) and reading.unclear == 0 and said == Counter(reading.things)
    scores.add("text_agrees", agrees)
    scores.add("text_right", said == Counter(example.images[0].things))


def _score_edit(scores: Scores, example: Example, image: np.ndarray) -> None:
    (target,), source = example.images, example.inputs[0]
    reading = read_image(image)
    original = draw_uint8(source)
    if example.kind == "edit-background":
        made = reading.background == target.background
        kept = things_psnr(image, original, source) >= MIN_PSNR and reading.shows(target)
    elif example.kind == "edit-join":
        made = reading.background == target.background and reading.shows(target)
        kept = things_psnr(image, original, source) >= MIN_PSNR
    else:
        wanted = [thing for thing in example.changed if thing in target.things]
        unwanted = [thing for thing in example.changed if thing not in target.things]
        made = (
            reading.unclear == 0
            and len(reading.things) == len(target.things)
            and all(thing in reading.things for thing in wanted)
            and not any(thing in reading.things for thing in unwanted)
        )
        psnr = unchanged_psnr(image, original, source, example.changed)
        kept = psnr >= MIN_PSNR
    scores.add("made", made)
    scores.add("kept", kept)
    scores.add("both", made and kept)
    scores.add(f"made:{example.kind.removeprefix('edit-')}", made)
    scores.add(f"kept:{example.kind.removeprefix('edit-')}", kept)


def _score_story(scores: Scores, example: Example, images: Sequence[np.ndarray], text: str) -> None:
    wanted = example.images
    readings = [read_image(image) for image in images]
    counted = len(images) == len(wanted)
    right = counted and all(
        reading.shows(scene) for reading, scene in zip(readings, wanted, strict=True)
    )
    scores.add("count", counted)
    scores.add("content", right)
    for reading, scene in zip(readings, wanted, strict=False):
        scores.add("background", reading.background == scene.background)
    said = text.replace(IMAGE_MARK, "")
    lines = "".join(part for part in example.answer if isinstance(part, str))
    scores.add("text", said.split() == lines.split())
    scores.add(f"content:{example.kind.removeprefix('story-')}", right)
