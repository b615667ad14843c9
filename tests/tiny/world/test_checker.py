"""The checker recovers what the world draws, also from images as a generator leaves them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from sensebatch.resolutions import BUCKETS_TINY
from sensebatch.tiny.world.checker import (
    read_image,
    score_things,
    things_psnr,
    unchanged_psnr,
)
from sensebatch.tiny.world.draw import draw_uint8
from sensebatch.tiny.world.scene import (
    CELLS,
    COLOURS,
    SHAPES,
    SIZES,
    SOFT_COLOURS,
    Background,
    Pattern,
    Scene,
    Split,
    Thing,
    sample_scene,
)

pytestmark = pytest.mark.slow

THING = st.builds(
    lambda shape, colour, size, cell: Thing(
        shape=shape, colour=colour, size=size, row=cell[0], column=cell[1]
    ),
    st.sampled_from(SHAPES),
    st.sampled_from(sorted(COLOURS)),
    st.sampled_from(sorted(SIZES)),
    st.sampled_from(CELLS),
)
PLAIN = st.builds(lambda name: Background(colours=(name,)), st.sampled_from(sorted(SOFT_COLOURS)))
TWO_COLOURS = st.builds(
    lambda pattern, names: Background(pattern=pattern, colours=tuple(names)),
    st.sampled_from([p for p in Pattern if p is not Pattern.PLAIN]),
    st.permutations(sorted(SOFT_COLOURS)).map(lambda names: names[:2]),
)
SCENE = st.builds(
    lambda size, background, things: Scene(
        resolution=size, background=background, things=tuple(things)
    ),
    st.sampled_from(sorted(BUCKETS_TINY.values())),
    st.one_of(PLAIN, TWO_COLOURS),
    st.lists(THING, min_size=0, max_size=3),
).filter(lambda scene: scene.is_valid)


@settings(max_examples=60)
@given(SCENE)
def test_recovers_every_scene_the_world_draws(scene: Scene) -> None:
    reading = read_image(draw_uint8(scene))
    assert reading.shows(scene)
    assert reading.background == scene.background


@settings(max_examples=40)
@given(SCENE, st.integers(0, 2**32 - 1))
def test_recovers_scenes_from_blurred_noisy_shifted_images(scene: Scene, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blurred = Image.fromarray(draw_uint8(scene)).filter(ImageFilter.GaussianBlur(1.0))
    pixels = np.asarray(blurred, dtype=np.float64)
    pixels += rng.normal(0, 8, pixels.shape) + rng.uniform(-8, 8, 3)
    reading = read_image(pixels.clip(0, 255).round().astype(np.uint8))
    assert reading.shows(scene)


def _scene(*things: Thing) -> Scene:
    return Scene(resolution=BUCKETS_TINY["1:1"], background=Background(), things=things)


RED = Thing(shape="circle", colour="red", size="large", row=0, column=0)
BLUE = Thing(shape="star", colour="blue", size="medium", row=2, column=1)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(RED, shape="square"),
        replace(RED, colour="orange"),
        replace(RED, size="medium"),
        replace(RED, column=1),
    ],
)
def test_tells_a_scene_from_one_that_differs_in_one_respect(wrong: Thing) -> None:
    reading = read_image(draw_uint8(_scene(wrong, BLUE)))
    assert not reading.shows(_scene(RED, BLUE))
    assert reading.shows(_scene(wrong, BLUE))


def test_a_blank_or_noise_image_shows_nothing_that_was_asked() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert not read_image(noise).shows(_scene(RED))
    assert read_image(np.full((256, 256, 3), 255, np.uint8)).things == ()


def test_two_things_that_run_together_are_unclear() -> None:
    image = draw_uint8(_scene(replace(RED, shape="square")))
    image[40:80, 40:140] = COLOURS["blue"]
    assert read_image(image).unclear == 1


def test_scores_each_respect_of_each_thing() -> None:
    reading = read_image(draw_uint8(_scene(replace(RED, shape="ring"), BLUE)))
    first, second = score_things(reading, _scene(RED, BLUE))
    assert (first.colour, first.shape, first.place, first.size) == (True, False, True, True)
    assert (second.colour, second.shape, second.place, second.size) == (True, True, True, True)
    missing = score_things(read_image(draw_uint8(_scene(BLUE))), _scene(RED, BLUE))
    assert [score.colour for score in missing] == [False, True]


def test_psnr_looks_only_outside_the_changed_boxes() -> None:
    before = draw_uint8(_scene(RED, BLUE))
    after = draw_uint8(_scene(replace(RED, colour="green"), BLUE))
    scene = _scene(RED, BLUE)
    assert unchanged_psnr(after, before, scene, (RED,)) > 60
    assert unchanged_psnr(after, before, scene, (BLUE,)) < 25
    assert things_psnr(after, before, _scene(BLUE)) > 60
    assert things_psnr(after, before, scene) < 25


def test_splits_never_share_a_combination() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        for split in Split:
            scene = sample_scene(rng, split, BUCKETS_TINY["1:1"])
            assert all(t.is_held_out == (split is Split.HELD_OUT) for t in scene.things)


def test_a_tenth_of_all_combinations_is_held_out_spread_over_every_shape_colour_and_place() -> None:
    held_out = [
        (shape, colour, cell)
        for shape in SHAPES
        for colour in COLOURS
        for cell in CELLS
        if Thing(shape=shape, colour=colour, size="small", row=cell[0], column=cell[1]).is_held_out
    ]
    total = len(SHAPES) * len(COLOURS) * len(CELLS)
    assert 0.08 * total < len(held_out) < 0.12 * total
    shapes, colours, cells = (set(values) for values in zip(*held_out, strict=True))
    assert (shapes, colours, cells) == (set(SHAPES), set(COLOURS), set(CELLS))
