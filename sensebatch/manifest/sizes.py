"""The sizes of a job's inputs after the first resize, and of the images it makes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sensebatch.config import TaskDefaults
from sensebatch.jobs import InputImage
from sensebatch.manifest.fields import SIZE_FIELDS, SKIP_RESIZE, JobFields
from sensebatch.manifest.problems import RowErrors, found, suggestion
from sensebatch.resolutions import (
    MAX_ASPECT_RATIO,
    MAX_SIDE,
    PixelLimits,
    Resolution,
    ResolutionError,
    edit_output_size,
    input_size,
    interleave_output_size,
    nearest_size,
)
from sensebatch.tasks import DrawingRule, SizeRule

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


def has_explicit_size(fields: JobFields) -> bool:
    """Returns whether a job or its manifest's defaults give a size."""
    return not SIZE_FIELDS.isdisjoint(fields.model_fields_set)


def explicit_size(
    fields: JobFields, buckets: Mapping[str, Resolution], errors: RowErrors
) -> Resolution | None:
    """Returns the size that the fields give, or None after adding what is wrong with them."""
    width, height = fields.width, fields.height
    if fields.resolution is not None:
        if width is not None or height is not None:
            errors.add("resolution", "expected either resolution or width and height, found both")
            return None
        if fields.resolution in buckets:
            return buckets[fields.resolution]
        match = _SIZE.fullmatch(fields.resolution)
        if match is None:
            known = ", ".join(buckets)
            message = f"expected one of {known} or WIDTHxHEIGHT, found {found(fields.resolution)}"
            errors.add("resolution", message + suggestion(fields.resolution, buckets))
            return None
        width, height = int(match.group(1)), int(match.group(2))
    if width is None or height is None:
        given, missing = ("height", "width") if width is None else ("width", "height")
        errors.add(missing, f"expected a number of pixels beside {given}, found nothing")
        return None
    return _checked(width, height, fields.resolution is None, errors)


def _checked(width: int, height: int, by_side: bool, errors: RowErrors) -> Resolution | None:
    """Returns the resolution with these sides; errors are in each side or in `resolution`."""
    num_errors = len(errors)
    for name, side in (("width", width), ("height", height)):
        label = "" if by_side else f"{name} as "
        if side > MAX_SIDE:
            message = f"expected {label}at most {MAX_SIDE}, found {side}"
            errors.add(name if by_side else "resolution", message)
            continue
        try:
            Resolution(width=side, height=side)
        except ResolutionError:
            message = f"expected {label}a positive multiple of 32, found {side}"
            errors.add(name if by_side else "resolution", message)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        message = f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, found {width}x{height}"
        errors.add("width" if by_side else "resolution", message)
    return Resolution(width=width, height=height) if len(errors) == num_errors else None


def resolved_input_max_pixels(
    fields: JobFields,
    default: int | str | None,
    limits: PixelLimits,
    num_images: int,
    errors: RowErrors,
) -> int | None:
    """Returns the pixels that inputs are brought to first; None leaves them as they are."""
    value = fields.given("input_max_pixels")
    if value == SKIP_RESIZE:
        return None
    if value is None:
        value = default
    elif isinstance(value, str) and value.isdecimal():
        value = int(value)
    try:
        return limits.resolve_input_max_pixels(value, num_images)
    except ResolutionError as error:
        errors.add("input_max_pixels", str(error))
        return None


def implied_size(
    rule: DrawingRule,
    target_pixels: int | None,
    *,
    defaults: TaskDefaults,
    limits: PixelLimits,
    images: tuple[InputImage, ...],
    input_max_pixels: int | None,
) -> Resolution:
    """Returns the size of a job that gives none: by its first input, or the default.

    Raises:
        ResolutionError: The first input is too long.
    """
    if not images or rule.size is SizeRule.OWN:
        assert defaults.resolution is not None
        return defaults.resolution
    height, width = images[0].height, images[0].width
    # A row that asks for a number of pixels gets them.
    if defaults.snap_sizes and target_pixels is None:
        return nearest_size(height, width, defaults.buckets.values())
    if rule.size is SizeRule.MODEL_LIMITS:
        return interleave_output_size(height, width, limits=limits)
    height, width = input_size(height, width, max_pixels=input_max_pixels)
    return edit_output_size(height, width, target_pixels=target_pixels or defaults.target_pixels)
