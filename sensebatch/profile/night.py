"""A night in the small: what a manifest of mixed jobs holds. Knows what is run, not how."""

from __future__ import annotations

from dataclasses import dataclass

from sensebatch.resolutions import PATCH_PIXELS, Resolution
from sensebatch.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Jobs of one kind."""

    name: str
    task: Task = Task.T2I
    think: bool = False
    resolution: Resolution
    num_jobs: int


def night_parts(size: Resolution) -> tuple[Part, ...]:
    """Returns the parts of a night of 40 jobs.

    Args:
        size: Size of the larger images; the smaller ones have half its sides, those of stories are
            as wide and 9/16 as high.
    """
    half = Resolution(height=_part(size.height, 1, 2), width=_part(size.width, 1, 2))
    wide = Resolution(height=_part(size.height, 9, 16), width=size.width)
    return (
        Part(name="large", resolution=size, num_jobs=12),
        Part(name="small", resolution=half, num_jobs=8),
        Part(name="think", think=True, resolution=size, num_jobs=4),
        Part(name="edit", task=Task.EDIT, resolution=size, num_jobs=10),
        Part(name="story", task=Task.INTERLEAVE, think=True, resolution=wide, num_jobs=6),
    )


def _part(pixels: int, numerator: int, denominator: int) -> int:
    """Returns a part of a side, a whole number of tokens and at least one."""
    tokens = pixels * numerator // (denominator * PATCH_PIXELS)
    return max(tokens, 1) * PATCH_PIXELS
