"""PNG files of colour images, in a small part of the time that Pillow takes.

What a model draws has grain, in which the search for repeated bytes finds next to none and takes
nine tenths of the time: what makes such a file small is the filters and short codes for small
differences. So only runs of equal bytes are looked for. Drawings that are exactly flat become up to
twice as large, and a smooth ramp four times; docs/measurements.md has figures.

Source: Portable Network Graphics (Third Edition), W3C; each row gets the filter with the least sum
of absolute differences. Left out: other kinds of pixels, interlacing, and rows without a filter,
which made no image smaller.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = 3
_FILTERS = np.array([1, 2, 3, 4], dtype=np.uint8)
"""Sub, Up, Average and Paeth: the byte on the left, above, the mean of both, and either or their
corner."""
_BLOCK_BYTES = 1 << 19
"""Bytes of pixels that are filtered at a time. Some thirty arrays of that size come and go, which
stay in the processor's cache; and as many operations ask for the interpreter, which may be busy
launching kernels."""


def encode_png(pixels: np.ndarray, texts: Mapping[str, str]) -> bytes:
    """Returns an image as the bytes of a PNG file.

    Args:
        pixels: uint8 `[height, width, 3]`.
        texts: Go into text chunks by these keywords, of at most 79 Latin letters.
    """
    height, width, _ = pixels.shape
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    parts = [_SIGNATURE, *_chunk(b"IHDR", header)]
    for keyword, text in texts.items():
        # Not compressed, in no language, and with a keyword that is not translated.
        parts += _chunk(b"iTXt", keyword.encode("latin-1") + bytes(5) + text.encode())
    rows = np.ascontiguousarray(pixels).reshape(height, width * _CHANNELS)
    parts += [*_chunk(b"IDAT", _compressed(rows)), *_chunk(b"IEND", b"")]
    return b"".join(parts)


def _compressed(rows: np.ndarray) -> bytes:
    compressor = zlib.compressobj(memLevel=9, strategy=zlib.Z_RLE)
    parts = [compressor.compress(block.data) for block in _filtered(rows)]
    return b"".join([*parts, compressor.flush()])


def _chunk(name: bytes, data: bytes) -> tuple[bytes, ...]:
    """Returns the parts of a chunk."""
    checksum = zlib.crc32(data, zlib.crc32(name))
    return struct.pack(">I", len(data)), name, data, struct.pack(">I", checksum)


def _filtered(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields rows as they are compressed, some at a time: the filter's number and differences.

    Args:
        rows: uint8 `[height, bytes]`.
    """
    height, num_bytes = rows.shape
    step = max(_BLOCK_BYTES // num_bytes, 1)
    for start in range(0, height, step):
        block = rows[start : start + step]
        # What is left of an image, and above it, is black.
        padded = np.zeros((len(block) + 1, _CHANNELS + num_bytes), dtype=np.uint8)
        padded[1:, _CHANNELS:] = block
        if start:
            padded[0, _CHANNELS:] = rows[start - 1]
        tried = _differences(padded)
        # A difference of 255 is one of -1.
        sums = [np.minimum(found, -found).sum(axis=1, dtype=np.uint32) for found in tried]
        best = np.argmin(sums, axis=0)
        filtered = np.empty((len(block), 1 + num_bytes), dtype=np.uint8)
        filtered[:, 0] = _FILTERS[best]
        filtered[:, 1:] = tried[best, np.arange(len(block))]
        yield filtered


def _differences(padded: np.ndarray) -> np.ndarray:
    """Returns how rows differ from what each filter expects, uint8 `[filters, rows, bytes]`.

    Args:
        padded: uint8 `[1 + rows, channels + bytes]`, with the row above and the pixels on the left.
    """
    here, left = padded[1:, _CHANNELS:], padded[1:, :-_CHANNELS]
    up, corner = padded[:-1, _CHANNELS:], padded[:-1, :-_CHANNELS]
    found = np.empty((len(_FILTERS), *here.shape), dtype=np.uint8)
    np.subtract(here, left, out=found[0])
    np.subtract(here, up, out=found[1])
    # The sum of both may have nine bits.
    np.subtract(here, ((left ^ up) >> 1) + (left & up), out=found[2])
    np.subtract(here, _paeth(left, up, corner), out=found[3])
    return found


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Returns of three bytes the nearest to `left + up - corner`; of equally near ones the first.

    That is as far from the larger of `left` and `up` as `corner` is from the smaller, and the other
    way round, so bytes are enough. Where `corner` is beyond one of them, no distance from that one
    is needed: the other is the nearest.
    """
    low, high = np.minimum(left, up), np.maximum(left, up)
    from_high = np.maximum(corner, low) - low
    from_low = high - np.minimum(corner, high)
    least, most = np.minimum(from_high, from_low), np.maximum(from_high, from_low)
    found = _chosen(from_high < from_low, high, low)
    return _chosen(most - least < least, corner, found)


def _chosen(is_first: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns `np.where` of bytes, in a fifth of its time."""
    return second ^ ((first ^ second) & -is_first.view(np.uint8))
