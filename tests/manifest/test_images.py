"""Input pictures are decoded once, damaged ones are noticed, and their hash is of the bytes."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sensebatch.manifest import images
from sensebatch.manifest.images import ImageProbe, UnusableImageError, check_picture

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")


def encoded(kind: str, size: tuple[int, int] = (60, 40)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_picture_is_accepted(kind: str) -> None:
    assert check_picture(encoded(kind)) == (60, 40)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 0.95])
def test_a_truncated_picture_is_refused(kind: str, part: float) -> None:
    content = encoded(kind)
    with pytest.raises(UnusableImageError):
        check_picture(content[: int(len(content) * part)])


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(FORMATS), place=st.floats(0, 1), junk=st.binary(min_size=1, max_size=9))
def test_damage_never_raises_anything_else(kind: str, place: float, junk: bytes) -> None:
    content = bytearray(encoded(kind))
    start = int(place * len(content))
    content[start : start + len(junk)] = junk
    try:
        width, height = check_picture(bytes(content))
    except UnusableImageError:
        return
    assert width > 0 < height


def test_a_picture_of_many_jobs_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counting(content: bytes) -> tuple[int, int]:
        decoded.append(len(content))
        return check_picture(content)

    monkeypatch.setattr(images, "check_picture", counting)
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    probe = ImageProbe()
    first = probe.file(path)
    assert probe.file(path) == first
    assert len(decoded) == 1
    path.write_bytes(encoded("PNG", (30, 20)))
    assert probe.file(path).width == 30
    assert len(decoded) == 2


def test_the_cache_forgets_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_CACHED", 2)
    probe = ImageProbe()
    for index in range(5):
        path = tmp_path / f"{index}.png"
        path.write_bytes(encoded("PNG", (8 + index, 8)))
        assert probe.file(path).width == 8 + index
    assert len(probe._facts) == 2


def test_the_hash_is_of_the_encoded_bytes(tmp_path: Path) -> None:
    content = encoded("WEBP")
    path = tmp_path / "a.webp"
    path.write_bytes(content)
    image: Any = ImageProbe().file(path)
    assert image.sha256 == hashlib.sha256(content).hexdigest()
    assert (image.height, image.width) == (40, 60)


def test_a_path_that_no_system_takes_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnusableImageError, match="expected a readable image file"):
        ImageProbe().file(tmp_path / "a\0b.png")


def test_a_picture_too_large_to_decode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnusableImageError, match="expected a smaller picture"):
        check_picture(encoded("PNG"))


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnusableImageError, match="found a device or pipe at"):
        ImageProbe().file(tmp_path / "pipe.png")
