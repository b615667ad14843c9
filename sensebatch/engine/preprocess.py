"""Turns images into patches and back. Knows pixels; the network embeds the patches.

Shape legend: H, W = height and width in pixels; P = patches of an image, row-major; D = numbers
of a patch, channel-first (c, y, x); B = images; C = 3 colour channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from sensebatch import image_files
from sensebatch.engine.model.patchify import MERGE, PATCH
from sensebatch.engine.prompts import Grid
from sensebatch.errors import JobError
from sensebatch.image_files import UnusableImageError
from sensebatch.jobs import InputImage
from sensebatch.resolutions import (
    PixelLimits,
    ResolutionError,
    input_size,
    smart_resize,
)

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """One image as the vision embedder reads it."""

    rows_PD: torch.Tensor
    """float32, normalised with ImageNet's mean and standard deviation."""
    grid_hw: tuple[int, int]
    """Rows and columns of patches."""

    @property
    def token_grid(self) -> Grid:
        """Rows and columns of tokens."""
        return Grid(self.grid_hw[0] // MERGE, self.grid_hw[1] // MERGE)


def decode_image(data: bytes, name: str, *, corrections: str | None = None) -> Image.Image:
    """Returns an encoded image as RGB, or as L where it is opaque grey; transparency becomes white.

    Args:
        data: An image file's bytes.
        name: What to call it in an error.
        corrections: What to do to the stored pixels, as `image_files.ImageFacts` has it; None does
            what every viewer does.

    Raises:
        JobError: The image cannot be used.
    """
    try:
        return image_files.decode_image(data, corrections=corrections)
    except UnusableImageError as error:
        raise JobError(f"{name}: {error}") from error


def resize_input(
    image: Image.Image, max_pixels: int | None, *, size: tuple[int, int] | None = None
) -> Image.Image:
    """Returns an edit's input after the first resize (Lanczos); small images grow.

    Args:
        image: RGB or L.
        max_pixels: The job's `input_max_pixels`; None skips the resize.
        size: Height and width that the rule goes by; the image's own if None.

    Raises:
        ResolutionError: The image is longer than the resize rule allows.
    """
    height, width = size or (image.height, image.width)
    height, width = input_size(height, width, max_pixels=max_pixels)
    return _resized(image, height, width, Image.Resampling.LANCZOS)


def resize_for_model(
    image: Image.Image,
    *,
    min_pixels: int,
    max_pixels: int,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Returns an input after the model's own resize (bicubic), sides multiples of 32.

    Args:
        image: RGB or L.
        min_pixels: Fewest pixels the model looks at.
        max_pixels: Most pixels the model looks at.
        size: Height and width that the rule goes by; the image's own if None.

    Raises:
        ResolutionError: The image is longer than the resize rule allows.
    """
    height, width = size or (image.height, image.width)
    resized = smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    return _resized(image, resized.height, resized.width, Image.Resampling.BICUBIC)


def load_input(
    data: bytes,
    name: str,
    *,
    num_images: int,
    first_max_pixels: int | None,
    limits: PixelLimits,
    draws: bool = True,
    planned: InputImage | None = None,
) -> Patches:
    """Returns an input image of a job as patches, after both resizes.

    Args:
        data: The encoded image.
        name: What to call it in an error.
        num_images: How many input images the job has; more images are made smaller.
        first_max_pixels: Pixels of the first resize, which only edit has; None skips it.
        limits: The checkpoint's.
        draws: Whether the job draws images.
        planned: What was found when the manifest was read; None finds it here.

    Raises:
        JobError: The image cannot be used.
    """
    image = decode_image(data, name, corrections=planned.corrections if planned else None)
    # An image that was decoded at a fraction of its size is resized by the rules for all of it.
    size = (planned.height, planned.width) if planned else (image.height, image.width)
    try:
        if first_max_pixels is not None:
            image = resize_input(image, first_max_pixels, size=size)
            size = (image.height, image.width)
        fewest, most = limits.model_pixels(num_images, draws=draws)
        image = resize_for_model(image, size=size, min_pixels=fewest, max_pixels=most)
    except ResolutionError as error:
        raise JobError(f"{name}: {error}") from error
    return image_to_patches(image)


def image_to_patches(image: Image.Image) -> Patches:
    """Returns an RGB or L image, sides multiples of 32, as normalised patches.

    The pixels are cut into patches as bytes, and then computed with in place: fresh memory for
    every step would take longer than the arithmetic, and a fast device waits for this.
    """
    pixels = np.asarray(image.convert("RGB"))
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    grid = pixels.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 4, 1, 3)
    levels = np.ascontiguousarray(grid).reshape(rows * columns, 3, PATCH * PATCH)
    # Not by torch, which would have all cores help each thread that does this.
    values = levels.astype(np.float32)
    mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (IMAGE_MEAN, IMAGE_STD))
    values /= np.float32(255)
    values -= mean
    values /= std
    return Patches(rows_PD=torch.from_numpy(values).flatten(1), grid_hw=(rows, columns))


def drawn_to_patches(image_CHW: torch.Tensor) -> Patches:
    """Returns a drawn image as normalised patches for the understanding path.

    Args:
        image_CHW: float32, values around [-1, 1]; neither clamped nor quantised, so that the
            network sees exactly what it drew.
    """
    return _normalised_patches(image_CHW.float() * 0.5 + 0.5)


def to_uint8(image_BCHW: torch.Tensor) -> torch.Tensor:
    """Returns drawn images as pixels, uint8 `[B, H, W, 3]`.

    The order of operations (scale, clamp, times 255, round half to even, all in float32) decides
    the levels of ties.
    """
    unit = (image_BCHW.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def patchify(image_CHW: torch.Tensor) -> torch.Tensor:
    """Returns an image's patches `[P, D]`, each row channel-first."""
    channels, height, width = image_CHW.shape
    grid = image_CHW.reshape(channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * PATCH * PATCH)


def _normalised_patches(unit_CHW: torch.Tensor) -> Patches:
    _, height, width = unit_CHW.shape
    mean = unit_CHW.new_tensor(IMAGE_MEAN).reshape(3, 1, 1)
    std = unit_CHW.new_tensor(IMAGE_STD).reshape(3, 1, 1)
    return Patches(
        rows_PD=patchify((unit_CHW - mean) / std),
        grid_hw=(height // PATCH, width // PATCH),
    )


def _resized(image: Image.Image, height: int, width: int, filter_: Image.Resampling) -> Image.Image:
    if (image.height, image.width) == (height, width):
        return image
    return image.resize((width, height), filter_)
