from __future__ import annotations

import io
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sensebatch.store import png
from sensebatch.store.png import encode_png


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields name and content of a PNG's chunks, whose checksums are right."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place = 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        checksum = int.from_bytes(data[end - 4 : end], "big")
        assert zlib.crc32(data[place + 4 : end - 4]) == checksum
        yield data[place + 4 : place + 8], data[place + 8 : end - 4]
        place = end


def rows_of(data: bytes, width: int) -> np.ndarray:
    """Returns the rows of a PNG as they were filtered, each with the filter's number first."""
    stream = b"".join(content for name, content in chunks(data) if name == b"IDAT")
    return np.frombuffer(zlib.decompress(stream), dtype=np.uint8).reshape(-1, 1 + 3 * width)


def decoded(data: bytes) -> np.ndarray:
    """Returns the pixels that Pillow finds."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def varied(side: int) -> np.ndarray:
    """Returns an image whose quarters suit different filters."""
    random = np.random.default_rng(0)
    quarter = side // 4
    across, down = np.arange(side), np.arange(quarter)
    slope = np.add.outer(down, across)[..., None]
    parts = [
        random.integers(0, 256, (quarter, 1, 3)) + np.zeros((1, side, 1)),
        random.integers(0, 256, (1, side, 3)) + np.zeros((quarter, 1, 1)),
        slope + random.integers(-8, 9, (quarter, side, 3)),
        np.where(slope % 32 < 16, 20, 230) + random.integers(0, 3, (quarter, side, 3)),
    ]
    return np.concatenate(parts).clip(0, 255).astype(np.uint8)


def expected_bytes(pixels: np.ndarray) -> np.ndarray:
    """Returns what Sub, Up, Average and Paeth expect, `[4, height, 3 * width]`."""
    padded = np.pad(pixels.astype(np.int64), ((1, 0), (1, 0), (0, 0)))
    left, up, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    # argmin takes the first of those that are equal, which is the order of the standard.
    far = [abs(left + up - corner - one) for one in (left, up, corner)]
    paeth = np.choose(np.argmin(far, axis=0), [left, up, corner])
    return np.stack([left, up, (left + up) // 2, paeth]).reshape(4, len(pixels), -1)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    most=st.sampled_from([1, 3, 255]),
    block=st.sampled_from([1, 40, 1 << 20]),
    seed=st.integers(0, 1 << 16),
)
def test_every_pixel_is_kept(height: int, width: int, most: int, block: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    # Sums wrap around, in both directions.
    pixels = random.integers(250, 251 + most, (height, width, 3)).astype(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png, "_BLOCK_BYTES", block)
        assert np.array_equal(decoded(encode_png(pixels, {})), pixels)


def test_each_row_has_the_filter_with_the_least_differences() -> None:
    pixels = varied(64)
    rows = rows_of(encode_png(pixels, {}), 64)
    differences = (pixels.reshape(64, -1) - expected_bytes(pixels)) % 256
    sums = np.minimum(differences, 256 - differences).sum(axis=2)
    assert set(rows[:, 0]) == {1, 2, 3, 4}
    for row, (number, *found) in enumerate(rows):
        assert sums[number - 1, row] == sums[:, row].min()
        assert np.array_equal(differences[number - 1, row], found)


def test_bytes_do_not_depend_on_how_much_is_filtered_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = varied(64)
    whole = encode_png(pixels, {})
    monkeypatch.setattr(png, "_BLOCK_BYTES", 1000)
    assert encode_png(pixels, {}) == whole


def test_pixels_may_lie_anywhere_in_memory() -> None:
    pixels = varied(32)
    turned = pixels.transpose(1, 0, 2)[:, ::-1]
    assert np.array_equal(decoded(encode_png(turned, {})), turned)


def test_only_runs_are_looked_for() -> None:
    # Two grainy halves that are equal: a search would find the second one.
    half = np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8)
    data = encode_png(np.concatenate([half, half]), {})
    assert len(data) > 2 * half.nbytes * 0.95
    flat = encode_png(np.full((32, 64, 3), 7, dtype=np.uint8), {})
    assert len(flat) < 200


def test_texts_stand_before_the_image_as_they_were_given() -> None:
    texts = {"XML:com.adobe.xmp": "<x>\u00e9</x>", "sensebatch": '{"prompt": "\U0001f408\\u0000"}'}
    data = encode_png(varied(16), texts)
    names = [name for name, _ in chunks(data)]
    assert names == [b"IHDR", b"iTXt", b"iTXt", b"IDAT", b"IEND"]
    with Image.open(io.BytesIO(data)) as image:
        assert {keyword: image.info[keyword] for keyword in texts} == texts
        assert image.info["xmp"] == texts["XML:com.adobe.xmp"].encode()
