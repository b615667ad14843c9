"""Questions have the answers that their images say, and near misses are misses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sensebatch.resolutions import BUCKETS_TINY
from sensebatch.tasks import Task
from sensebatch.tiny.world.captions import PLACES, read_things
from sensebatch.tiny.world.checker import read_image
from sensebatch.tiny.world.draw import draw_uint8
from sensebatch.tiny.world.examples import Example
from sensebatch.tiny.world.questions import (
    COUNTS,
    SHORT,
    WHICH,
    YES_NO,
    ask,
    other_thing,
    spoil,
)
from sensebatch.tiny.world.scene import COLOURS, SHAPES, SIZES, Split, sample_scene

SQUARE = BUCKETS_TINY["1:1"]


def examples(kind: str, count: int = 60, split: Split = Split.TRAIN) -> list[Example]:
    rng = np.random.default_rng(5)
    return [ask(rng, split, SQUARE, kinds=(kind,)) for _ in range(count)]


ANSWERS = {
    "colour": set(COLOURS),
    "shape": set(SHAPES),
    "size": set(SIZES),
    "where": {phrases[0] for phrases in PLACES.values()},
    "count": set(COUNTS),
    "compare": {*WHICH, *YES_NO},
    **{kind: set(YES_NO) for kind in ("there", "property", "relation", "judge")},
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_short_answers_are_words_to_choose_from(kind: str) -> None:
    found = Counter(example.text for example in examples(kind, 300))
    assert found.keys() <= ANSWERS[kind]
    assert len(found) > 1
    if ANSWERS[kind] == set(YES_NO):
        assert 0.3 < found["yes"] / 300 < 0.7, "no answer is right most of the time"


@pytest.mark.parametrize("kind", [*SHORT, "caption"])
def test_training_never_shows_what_is_held_out(kind: str) -> None:
    for example in examples(kind, 40):
        assert example.task is Task.ASK
        seen = [*example.inputs, *([example.faint] if example.faint is not None else [])]
        assert not any(thing.is_held_out for scene in seen for thing in scene.things)
        assert all(scene.is_valid for scene in seen)


def test_captions_name_what_the_image_shows() -> None:
    for example in examples("caption", 12, Split.HELD_OUT):
        reading = read_image(draw_uint8(example.inputs[0]))
        assert Counter(read_things(example.text)) == Counter(reading.things)


def test_a_near_miss_differs_in_what_can_be_seen() -> None:
    rng = np.random.default_rng(1)
    for _ in range(12):
        scene = sample_scene(rng, Split.TRAIN, SQUARE)
        other = spoil(rng, scene)
        reading = read_image(draw_uint8(other))
        assert reading.shows(other)
        assert not (reading.shows(scene) and reading.background == scene.background)
        thing = scene.things[0]
        changed = other_thing(rng, thing)
        names = ("colour", "shape", "size", "cell")
        assert sum(getattr(changed, name) != getattr(thing, name) for name in names) == 1


def test_answers_follow_from_the_image() -> None:
    for example in examples("where"):
        (thing,) = (
            (t for t in example.inputs[0].things if t.colour in example.prompt.split())
            if (set(COLOURS) & set(example.prompt.split()))
            else (t for t in example.inputs[0].things if t.shape in example.prompt)
        )
        assert example.text == PLACES[thing.cell][0]
    for example in examples("shape"):
        assert example.text in {thing.shape for thing in example.inputs[0].things}
    for example in examples("count"):
        if "things" in example.prompt:
            assert COUNTS.index(example.text) == len(example.inputs[0].things)
