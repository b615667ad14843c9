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


def test_hashes_are_those_of_imagehash() -> None:
    imagehash = pytest.importorskip("imagehash")
    rng = np.random.default_rng(0)
    for size in ((64, 64), (100, 37), (33, 200)):
        noise = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        assert phash_of(noise) == str(imagehash.phash(noise))
    assert phash_of(scene(20)) == str(imagehash.phash(scene(20)))
