"""Prompts say what the checker tests, once and without doubt."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from sensebatch.resolutions import BUCKETS_TINY
from sensebatch.tasks import Task
from sensebatch.tiny.world.captions import (
    PLACES,
    SIZE_WORDS,
    describe_scene,
    fixed_scene,
    read_things,
)
from sensebatch.tiny.world.draw import draw_uint8
from sensebatch.tiny.world.edits import edit
from sensebatch.tiny.world.examples import text_to_image
from sensebatch.tiny.world.scene import CELLS, COLOURS, Scene, Split, sample_scene
from sensebatch.tiny.world.stories import story

SQUARE = BUCKETS_TINY["1:1"]


def _scenes(count: int) -> list[tuple[np.random.Generator, Scene]]:
    rng = np.random.default_rng(0)
    return [(rng, sample_scene(rng, Split.TRAIN, SQUARE)) for _ in range(count)]


def test_every_thing_is_named_with_colour_shape_and_size() -> None:
    for rng, scene in _scenes(300):
        text = describe_scene(rng, scene).lower()
        for thing in scene.things:
            found = re.search(rf"(\w+) {thing.colour} {thing.shape}\b", text)
            assert found is not None, text
            stated = {word for word in SIZE_WORDS[thing.size] if word}
            others = {w for s, words in SIZE_WORDS.items() if s != thing.size for w in words if w}
            assert found[1] not in others, text
            assert thing.size == "medium" or found[1] in stated, text


def test_background_colours_are_named_unless_plain_white() -> None:
    for rng, scene in _scenes(300):
        text = describe_scene(rng, scene)
        for name in scene.background.colours:
            assert name == "white" or name in text


def test_place_phrases_are_of_one_place_each() -> None:
    phrases = [(phrase, cell) for cell in CELLS for phrase in set(PLACES[cell])]
    assert len({phrase for phrase, _ in phrases}) == len(phrases)


def test_the_fixed_form_is_read_back() -> None:
    for _, scene in _scenes(200):
        assert set(read_things(fixed_scene(scene))) == set(scene.things)


@pytest.mark.parametrize("sample", [text_to_image, edit, story])
@pytest.mark.parametrize("split", list(Split))
def test_examples_are_valid_and_the_same_for_the_same_seed(sample: Any, split: Split) -> None:
    for seed in range(150):
        first = sample(np.random.default_rng(seed), split, SQUARE, think=seed % 2 == 0)
        assert first == sample(np.random.default_rng(seed), split, SQUARE, think=seed % 2 == 0)
        assert all(scene.is_valid for scene in (*first.inputs, *first.images))
        assert {scene.resolution for scene in (*first.inputs, *first.images)} == {SQUARE}


@pytest.mark.parametrize("sample", [text_to_image, edit, story])
def test_training_examples_show_no_held_out_combination(sample: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        example = sample(rng, Split.TRAIN, SQUARE, think=False)
        for scene in (*example.inputs, *example.images):
            assert not any(thing.is_held_out for thing in scene.things)


def test_an_edit_changes_only_what_it_says() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        example = edit(rng, Split.HELD_OUT, SQUARE, think=False)
        if example.kind in ("edit-background", "edit-join"):
            continue
        (target,), source = example.images, example.inputs[0]
        same = set(source.things) ^ set(target.things)
        assert same == set(example.changed), example
        assert source.background == target.background
        if example.kind == "edit-colour":
            assert {thing.colour for thing in example.changed} <= set(COLOURS)


def test_stories_say_how_many_images_follow_and_end_with_one() -> None:
    rng = np.random.default_rng(0)
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    for _ in range(200):
        example = story(rng, Split.TRAIN, SQUARE, think=False)
        assert example.task is Task.INTERLEAVE
        assert isinstance(example.answer[-1], Scene)
        asked = re.search(r" in (\w+) (?:steps?|pictures?)\b", example.prompt)
        if asked is not None:
            assert numbers[asked[1]] == len(example.images)
        assert asked is not None or example.inputs


def test_a_image_is_the_same_every_time() -> None:
    (_, scene), *_ = _scenes(1)
    assert np.array_equal(draw_uint8(scene), draw_uint8(scene))
    assert draw_uint8(scene).shape == (256, 256, 3)
