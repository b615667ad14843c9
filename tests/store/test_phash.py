"""Perceptual hashes: near for images that look alike, and those of the library that is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sensebatch.store.phash import BITS, phash, phash_of


def scene(shift: int = 0) -> Image.Image:
    image = Image.new("RGB", (256, 192), (200, 220, 240))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40 + shift, 30, 130 + shift, 120), fill=(200, 30, 30))
    draw.rectangle((150, 90, 240, 180), fill=(20, 60, 160))
    return image


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_hash_of_pixels_is_that_of_the_image() -> None:
    image = scene()
    assert phash(np.asarray(image)) == phash_of(image)
    assert len(phash_of(image)) == BITS // 4


def test_images_that_look_alike_differ_in_few_bits() -> None:
    image = phash_of(scene())
    smaller = phash_of(scene().resize((128, 96)))
    brighter = phash((np.asarray(scene()) * 0.95 + 6).astype(np.uint8))
    other = phash_of(scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert distance(image, smaller) <= 4
    assert distance(image, brighter) <= 4
    assert distance(image, other) > 16


def test_plain_image_has_no_bits_of_rounding_errors() -> None:
    assert phash_of(Image.new("RGB", (64, 64), (17, 99, 3))) == "8" + "0" * 15


def noise(*size: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (scene(), "f8b5c648b3079768"),
        (scene(20), "e8b38f49b40e9669"),
        (noise(64, 64), "d76b482e3f83680b"),
        (noise(33, 200), "a4b21e27ec543673"),
        (scene().convert("L"), "f8b5c648b3079768"),
    ],
)
def test_hashes_are_those_of_imagehash(image: Image.Image, expected: str) -> None:
    # What `imagehash.phash` of ImageHash 4.3.2 returns.
    assert phash_of(image) == expected
