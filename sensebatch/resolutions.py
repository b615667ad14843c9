"""Image sizes: the token grid, the resize rules and the named aspect ratios. Integers only.

The sides of every size are multiples of `PATCH_PIXELS`, the side of one image token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sensebatch.errors import SensebatchError

PATCH_PIXELS = 32
TOKEN_NUMBERS = PATCH_PIXELS * PATCH_PIXELS * 3
"""Numbers of one image token: the channels of its pixels."""
MAX_ASPECT_RATIO = 200
MAX_SIDE = 16384
"""Longest side that a user may ask for; eight times that of full-size images."""


class ResolutionError(SensebatchError):
    """A size that the model can neither draw nor read."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Resolution:
    """An image size in pixels; both sides are multiples of `PATCH_PIXELS`.

    Raises:
        ResolutionError: A side is not a positive multiple of `PATCH_PIXELS`.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            if side <= 0 or side % PATCH_PIXELS:
                raise ResolutionError(
                    f"expected {name} as a positive multiple of {PATCH_PIXELS}, found {side}"
                )

    @classmethod
    def asked_for(cls, *, width: int, height: int) -> Resolution:
        """Returns a size that a user gave.

        Raises:
            ResolutionError: A side is longer than `MAX_SIDE`, or is not a size at all.
        """
        for name, side in (("height", height), ("width", width)):
            if side > MAX_SIDE:
                raise ResolutionError(f"expected {name} as at most {MAX_SIDE}, found {side}")
        return cls(width=width, height=height)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image of this size."""
        return (self.height // PATCH_PIXELS) * (self.width // PATCH_PIXELS)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelLimits:
    """How many pixels a checkpoint was trained with; the resize rules of inputs follow from it."""

    base_pixels: int = 2048 * 2048
    """Pixels of a full-size image."""
    min_pixels: int = 512 * 512
    """Smaller input images are enlarged to this many."""
    min_asked_pixels: int = 256 * 256
    """Smaller images that are only asked about are enlarged to this many."""

    def model_pixels(self, num_images: int, *, draws: bool = True) -> tuple[int, int]:
        """Returns the fewest and most pixels of each input image.

        Args:
            num_images: How many there are in the prompt.
            draws: Whether the job draws images. Otherwise each input may be as large as if it were
                the only one.
        """
        if not draws:
            return self.min_asked_pixels, self.base_pixels
        most = min(self.base_pixels, 4 * self.base_pixels // max(num_images, 1))
        return self.min_pixels, most

    def auto_input_max_pixels(self, num_images: int) -> int:
        """Returns what `input_max_pixels: auto` means in a prompt with `num_images` images."""
        if num_images <= 2:
            return self.base_pixels
        return max(2 * self.base_pixels // num_images, self.min_pixels)

    def resolve_input_max_pixels(self, value: int | str | None, num_images: int) -> int | None:
        """Returns the pixels that `auto` or a number means; None skips the first resize.

        Raises:
            ResolutionError: The number is below `min_pixels`, or the word is not `auto`.
        """
        if value is None:
            return None
        if isinstance(value, str):
            if value != "auto":
                raise ResolutionError(
                    f"expected 'auto', null or a number of pixels, found {value!r}"
                )
            return self.auto_input_max_pixels(num_images)
        if value < self.min_pixels:
            raise ResolutionError(f"expected at least {self.min_pixels} pixels, found {value}")
        return value


def smart_resize(height: int, width: int, *, min_pixels: int, max_pixels: int) -> Resolution:
    """Returns the multiple-of-32 size that keeps the aspect ratio within the pixel limits.

    Both sides are rounded to the factor (half to even). Above `max_pixels` the original sides are
    scaled down and floored, below `min_pixels` they are scaled up and ceiled. A very long image may
    exceed `max_pixels`, because no side is less than one token.

    Raises:
        ResolutionError: The sides are not positive or their ratio exceeds `MAX_ASPECT_RATIO`.

    Source: `smart_resize` of the SenseNova-U1 release (there after Qwen2-VL).
    """
    if height <= 0 or width <= 0:
        raise ResolutionError(f"expected positive sides, found {width}x{height}")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ResolutionError(
            f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, found {ratio:.1f} "
            f"({width}x{height})"
        )
    factor = PATCH_PIXELS
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        scale = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return Resolution(height=new_height, width=new_width)


def input_size(height: int, width: int, *, max_pixels: int | None) -> tuple[int, int]:
    """Returns (height, width) of an edit input after the first resize, which None skips.

    Raises:
        ResolutionError: See `smart_resize`.
    """
    if max_pixels is None:
        return height, width
    size = smart_resize(height, width, min_pixels=max_pixels, max_pixels=max_pixels)
    return size.height, size.width


def edit_output_size(height: int, width: int, *, target_pixels: int) -> Resolution:
    """Returns the output size of an edit; the sides are those of its first input, resized.

    Raises:
        ResolutionError: See `smart_resize`.
    """
    return smart_resize(height, width, min_pixels=target_pixels, max_pixels=target_pixels)


def interleave_output_size(height: int, width: int, *, limits: PixelLimits) -> Resolution:
    """Returns the size of an interleave job's images; the sides are those of its first input.

    Raises:
        ResolutionError: See `smart_resize`.
    """
    return smart_resize(
        height, width, min_pixels=limits.min_pixels, max_pixels=limits.base_pixels // 2
    )


def nearest_size(height: int, width: int, known: Iterable[Resolution]) -> Resolution:
    """Returns the known size whose aspect ratio is nearest to that of the sides."""
    ratio = math.log(width / height)
    return min(known, key=lambda other: abs(math.log(other.width / other.height) - ratio))


def _with_transposed(table: dict[str, tuple[int, int]]) -> dict[str, Resolution]:
    """Returns resolutions by `W:H` from (width, height) pairs, transposed ratios included."""
    sizes: dict[str, Resolution] = {}
    for name, (width, height) in table.items():
        sizes[name] = Resolution(height=height, width=width)
        first, second = name.split(":")
        sizes[f"{second}:{first}"] = Resolution(height=width, width=height)
    return sizes


BUCKETS_T2I = _with_transposed(
    {
        "1:1": (2048, 2048),
        "16:9": (2720, 1536),
        "3:2": (2496, 1664),
        "4:3": (2368, 1760),
        "2:1": (2880, 1440),
        "3:1": (3456, 1152),
    }
)
"""The t2i and edit sizes that the official checkpoints were trained with."""

BUCKETS_INTERLEAVE = _with_transposed(
    {
        "1:1": (1536, 1536),
        "16:9": (2048, 1152),
        "3:2": (1888, 1248),
        "4:3": (1760, 1312),
        "2:1": (2144, 1088),
        "3:1": (2592, 864),
    }
)
"""The interleave sizes that the official checkpoints were trained with."""

BUCKETS_TINY = _with_transposed(
    {
        "1:1": (256, 256),
        "16:9": (320, 192),
        "3:2": (288, 192),
        "4:3": (288, 224),
        "2:1": (320, 160),
        "3:1": (384, 128),
    }
)
"""The sizes of the embedded checkpoint, for all tasks."""
