"""Questions have the answers that their images say, and near misses are misses."""

from __future__ import annotations

import itertools
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
    ask_together,
    other_thing,
    spoil,
)
from sensebatch.tiny.world.scene import COLOURS, SHAPES, SIZES, Split, Thing, sample_scene

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


@pytest.mark.parametrize("kind", ["there", "property"])
def test_training_never_asks_for_what_is_held_out(kind: str) -> None:
    """What is never shown is never there: the answer would be known without the image."""
    hidden = [
        (f"{colour} {shape}", f" {phrase}?")
        for shape, colour, (row, column) in itertools.product(SHAPES, COLOURS, PLACES)
        for phrase in PLACES[row, column]
        if Thing(shape=shape, colour=colour, size="small", row=row, column=column).is_held_out
    ]

    def names_one(example: Example) -> bool:
        text = example.prompt
        return any(name in text and text.endswith(place) for name, place in hidden)

    assert not any(map(names_one, examples(kind, 200)))
    assert any(map(names_one, examples(kind, 200, Split.HELD_OUT)))


def test_questions_asked_together_differ_and_are_about_the_same_images() -> None:
    rng = np.random.default_rng(2)
    kinds: set[str] = set()
    for _ in range(60):
        asked = ask_together(rng, Split.TRAIN, SQUARE, 5)
        assert len({example.prompt for example in asked}) == len(asked) <= 5
        assert len({(example.inputs, example.faint) for example in asked}) == 1
        assert sum(example.kind == "ask-caption" for example in asked) <= 1
        if asked[0].faint is not None:
            assert {example.text for example in asked} == {"no"}
        kinds |= {example.kind for example in asked[1:]}
    assert kinds == {f"ask-{kind}" for kind in (*SHORT, "caption")}


def test_judgements_asked_together_are_true_of_the_image() -> None:
    rng, found = np.random.default_rng(3), Counter[str]()
    while found.total() < 60:
        asked = ask_together(rng, Split.TRAIN, SQUARE, 6)
        for example in asked[1:]:
            if example.kind == "ask-judge" and example.faint is None:
                found[example.text] += 1
                named = [colour for colour in COLOURS if f" {colour} " in example.prompt]
                shown = [thing.colour for thing in example.inputs[0].things]
                if example.text == "yes":
                    assert sorted(named) == sorted(shown)
    assert 15 < found["yes"] < 45


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
