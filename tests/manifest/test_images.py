"""Input images are decoded once, and their hash is of the bytes."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sensebatch.image_files import ImageFacts, UnusableImageError, check_image
from sensebatch.manifest import images
from sensebatch.manifest.images import ImageProbe


def encoded(kind: str, size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def test_an_image_of_many_jobs_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counting(content: bytes, **options: Any) -> ImageFacts:
        decoded.append(len(content))
        return check_image(content, **options)

    monkeypatch.setattr(images, "check_image", counting)
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
    assert len(probe._probed) == 2


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


def test_the_bound_on_pixels_is_that_of_the_probe(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    with pytest.raises(UnusableImageError, match=r"at most 1,000 pixels, found 60x40: .*a\.png"):
        ImageProbe(max_pixels=1000).file(tmp_path / "a.png")


def test_a_file_far_too_large_for_an_image_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(200 * 2**30)
    with pytest.raises(UnusableImageError, match=r"at most 1,073,741,824 bytes, found 214,748,36"):
        ImageProbe().file(path)


def test_what_a_terminal_obeys_is_shown_harmlessly(tmp_path: Path) -> None:
    with pytest.raises(UnusableImageError) as refused:
        ImageProbe().file(tmp_path / "a\x1b[31m.png")
    assert "\\x1b[31m" in str(refused.value)
    assert "\x1b" not in str(refused.value)


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnusableImageError, match="expected a file, found a device or pipe: "):
        ImageProbe().file(tmp_path / "pipe.png")
