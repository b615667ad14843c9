from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensebatch.config import OutputConfig
from sensebatch.store.images import encode_image, image_metadata, read_metadata
from tests.executor.fakes import SMALL, FakeEngine, drawn_image, make_job, to_pixels

PIXELS = to_pixels(drawn_image(SMALL, "pixels"))


def metadata(prompt: str = "a cat") -> dict[str, Any]:
    return image_metadata(make_job("a", prompt=prompt), "k" * 64, FakeEngine().info, 0)


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_same_image_gives_the_same_bytes(image_format: str) -> None:
    output = OutputConfig(image_format=image_format)
    assert encode_image(PIXELS, output, metadata()) == encode_image(PIXELS, output, metadata())


@pytest.mark.parametrize(("image_format", "quality"), [("png", 1), ("webp", 100)])
def test_lossless_formats_keep_every_pixel(image_format: str, quality: int) -> None:
    output = OutputConfig(image_format=image_format, image_quality=quality)
    with Image.open(io.BytesIO(encode_image(PIXELS, output, metadata()))) as image:
        assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_metadata_can_be_turned_off(image_format: str) -> None:
    output = OutputConfig(image_format=image_format, embed_metadata=False)
    with Image.open(io.BytesIO(encode_image(PIXELS, output, metadata()))) as image:
        assert read_metadata(image) is None


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_very_long_prompt_does_not_cost_the_image(image_format: str) -> None:
    prompt = "\U0001f408" * 50_000
    data = encode_image(PIXELS, OutputConfig(image_format=image_format), metadata(prompt))
    with Image.open(io.BytesIO(data)) as image:
        found = read_metadata(image)
    assert found is not None
    assert prompt.startswith(found["prompt"])
    assert len(found["prompt"]) >= 1000


def test_array_that_is_not_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8 pixels"):
        encode_image(PIXELS.astype(np.float32), OutputConfig(), metadata())


def test_png_looks_for_runs_alone() -> None:
    half = np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8)
    output = OutputConfig(embed_metadata=False)
    # A search for repeats would find the second half.
    assert len(encode_image(np.concatenate([half, half]), output, {})) > 2 * half.nbytes * 0.95
    assert len(encode_image(np.full((32, 64, 3), 7, dtype=np.uint8), output, {})) < 200


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Returns the names and contents of a PNG's chunks, whose checksums are right."""
    found, start = [], len(b"\x89PNG\r\n\x1a\n")
    while start < len(png):
        length = int.from_bytes(png[start : start + 4], "big")
        name, content = png[start + 4 : start + 8], png[start + 8 : start + 8 + length]
        end = start + 12 + length
        assert zlib.crc32(name + content) == int.from_bytes(png[end - 4 : end], "big")
        found.append((name, content))
        start = end
    return found


@pytest.mark.parametrize("shape", [(7, 3), (64, 300)])
def test_all_rows_of_a_png_have_the_same_filter(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = chunks(encode_image(pixels, OutputConfig(), metadata()))
    names = [name for name, _ in found]
    assert names[:3] == [b"IHDR", b"iTXt", b"iTXt"]
    assert names[-1] == b"IEND"
    rows = zlib.decompress(b"".join(content for name, content in found if name == b"IDAT"))
    paeth = 4
    assert set(rows[:: 3 * shape[1] + 1]) == {paeth}


def test_a_view_of_pixels_is_written_as_it_looks() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    for view in (rows[::-1], rows[:, ::2], rows.transpose(1, 0, 2)):
        with Image.open(io.BytesIO(encode_image(view, OutputConfig(), metadata()))) as image:
            assert np.array_equal(np.asarray(image), view)
