"""Perceptual hashes: 64 bits of an image, of which those that look alike share nearly all.

Source: `imagehash.phash` of JohannesBuchner/imagehash, with which the digits are equal: the lowest
8 by 8 frequencies of the image at 32 by 32 grey pixels, each compared with their median.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

BITS = 64
"""Bits of a hash."""

_SIDE = 8
_PIXELS = 4 * _SIDE


def _cosines() -> np.ndarray:
    """Returns the lowest rows of the discrete cosine transform, `[8, 32]`."""
    frequencies, places = np.arange(_SIDE)[:, None], np.arange(_PIXELS)[None, :]
    return 2 * np.cos(np.pi * frequencies * (2 * places + 1) / (2 * _PIXELS))


_COSINES = _cosines()


def phash(pixels: np.ndarray) -> str:
    """Returns the perceptual hash of an image as 16 hex digits.

    Args:
        pixels: uint8 `[height, width, 3]`.
    """
    return phash_of(Image.fromarray(np.ascontiguousarray(pixels)))


def phash_of(image: Image.Image) -> str:
    """Returns the perceptual hash of an open image as 16 hex digits."""
    grey = image.convert("L").resize((_PIXELS, _PIXELS), Image.Resampling.LANCZOS)
    # Rounded, or the bits of a plain image would be those of rounding errors.
    low = np.round(_COSINES @ np.asarray(grey, dtype=np.float64) @ _COSINES.T, 6)
    bits = (low > np.median(low)).flatten()
    return np.packbits(bits).tobytes().hex()
