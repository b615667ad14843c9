"""Images of a manifest that other jobs of it make: `@harbour`, or `@story/2` for the third.

Knows of every job with an id of its own what it makes, and nothing else of it.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sensebatch.image_files import UnusableImageError
from sensebatch.jobs import InputImage, Job
from sensebatch.manifest.expand import filled, image_references, placeholders
from sensebatch.manifest.fields import IMAGE_FIELDS
from sensebatch.manifest.ids import slug, with_suffixes
from sensebatch.manifest.problems import ALIKE, found
from sensebatch.resolutions import Resolution

_REFERENCE = re.compile(r"@([^/]+)(?:/([0-9]{1,4}))?")
_MAX_SUGGESTED = 10_000
"""Ids among which a similar one is looked for."""
_SHORT = 4
"""Characters of an id that one letter more or less changes a lot."""


@dataclass(frozen=True, slots=True)
class _Made:
    """What a job makes."""

    size: Resolution | None
    num_images: int
    """At most."""
    level: int


_made = lru_cache(maxsize=4096)(_Made)
"""Most jobs make the same as others, which becomes one object."""


class Outputs:
    """What the jobs of manifests make that others may start from."""

    def __init__(self) -> None:
        self._made: dict[str, _Made] = {}
        self._broken: set[str] = set()

    def add(self, job: Job) -> None:
        """Remembers what a job makes."""
        self._made[job.id] = _made(job.resolution, job.max_images, job.level)

    def add_broken(self, job_id: str) -> None:
        """Remembers that a job has mistakes of its own, so that its children need none."""
        self._broken.add(job_id)

    def is_broken(self, job_ids: Collection[str]) -> bool:
        """Returns whether one of some jobs has mistakes of its own."""
        return not self._broken.isdisjoint(job_ids)

    def is_waiting(self, fields: Mapping[str, Any], axes: Mapping[str, Any]) -> bool:
        """Returns whether a row names a job that was not read yet."""
        if IMAGE_FIELDS.isdisjoint(fields):
            return False
        for _, reference in image_references(fields):
            with suppress(UnusableImageError):
                if self._named(reference, axes)[0] is None:
                    return True
        return False

    def image(self, reference: str, axes: Mapping[str, Any]) -> InputImage:
        """Returns the image that a reference names.

        Args:
            reference: `@ID` or `@ID/N`; names in braces stand for the values of `axes`.
            axes: The seed and the values of the matrix that made this job of its row. Those the
                reference does not name may be those by which the other job differs from the
                others of its row.

        Raises:
            UnusableImageError: It is not a reference, no job read so far has the name, or the job
                does not make the image.
        """
        job_id, index = self._named(reference, axes)
        if job_id is None:
            raise UnusableImageError(
                f"expected @ and the id of another job, found {found(reference)}; "
                f"{self._advice(reference, axes)}"
            )
        made = self._made[job_id]
        if made.size is None or index >= made.num_images:
            number = {0: "none", 1: "one"}.get(made.num_images, f"at most {made.num_images}")
            counted = ", counted from 0" if made.num_images else ""
            raise UnusableImageError(
                f"expected an image of job {job_id}, which makes {number}, found "
                f"{found(reference)}{counted}"
            )
        return InputImage(
            path=reference_to(job_id, index),
            sha256="",
            height=made.size.height,
            width=made.size.width,
            output=(job_id, index),
        )

    def _named(self, reference: str, axes: Mapping[str, Any]) -> tuple[str | None, int]:
        """Returns the id of the job that a reference names and the image's index.

        The id is None where no job read so far has the name; one that comes later may.
        """
        candidates, index = parse(reference, axes)
        return next((one for one in candidates if one in self._made), None), index

    def _advice(self, reference: str, axes: Mapping[str, Any]) -> str:
        """Returns what a reference that names no job may mean."""
        candidates, index = parse(reference, axes)
        meant = self._meant(candidates[0])
        if meant is None:
            return f"a file of this name is written ./{reference}"
        # Whole, since it is to be typed.
        return f"did you mean {reference_to(meant, index)!r}?"

    def _meant(self, name: str) -> str | None:
        """Returns the id of which an unknown one is a typo, or the first of its row."""
        if len(self._made) > _MAX_SUGGESTED:
            return None
        of_row = (one for one in self._made if one.startswith(f"{name}-") and "=" in one)
        folded = (one for one in self._made if one.casefold() == name.casefold())
        close = difflib.get_close_matches(name, self._made, n=1, cutoff=_alike(name))
        return next(itertools.chain(folded, of_row, close), None)

    def level(self, images: Sequence[InputImage]) -> int:
        """Returns how many jobs have to be done, one after the other, before these are there."""
        levels = (self._made[image.output[0]].level + 1 for image in images if image.output)
        return max(levels, default=0)


def reference_to(job_id: str, index: int) -> str:
    """Returns how manifests name an image of a job."""
    return f"@{job_id}/{index}" if index else f"@{job_id}"


def parse(reference: str, axes: Mapping[str, Any]) -> tuple[list[str], int]:
    """Returns the ids that a reference may mean, the likeliest first, and the image's index.

    Raises:
        UnusableImageError: It is not a reference.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UnusableImageError(
            f"expected @ID, or @ID/N for image N of several, counted from 0, found "
            f"{found(reference)}"
        )
    job_id, index = match[1], int(match[2] or 0)
    if not axes:
        return [job_id], index
    used = placeholders(job_id)
    if unknown := sorted(used - axes.keys()):
        known = ", ".join(f"{{{name}}}" for name in sorted(axes))
        raise UnusableImageError(
            f"expected one of {known}, found {{{unknown[0]}}} in {found(reference)}"
        )
    plain = filled(job_id, {name: slug(value) for name, value in axes.items()})
    unused = sorted(axes.keys() - used)
    suffixes = [
        with_suffixes(plain, ((name, axes[name]) for name in names))
        for count in range(len(unused), 0, -1)
        for names in itertools.combinations(unused, count)
    ]
    return [plain, *suffixes], index


def _alike(name: str) -> float:
    """Returns how similar an id must be, from 0 to 1, for a name to be a typo of it."""
    return 0.6 if len(name) <= _SHORT else ALIKE


def cycle(start: str, waits_for: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns jobs of which each starts from the next, up to one that is there twice.

    Args:
        start: The first.
        waits_for: The jobs that each waits for.

    Returns:
        Nothing if `start` leads to no cycle.
    """
    path, places = [start], {start: 0}
    while following := waits_for.get(path[-1]):
        path.append(following[0])
        if path[-1] in places:
            return path[places[path[-1]] :]
        places[path[-1]] = len(path) - 1
    return []
