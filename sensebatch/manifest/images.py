"""Looks at input images: that they decode, how large they are, and the hash of their bytes.

Each file is read once, however many jobs use it, and several at a time where they are known ahead.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sensebatch.bounded import UnreadableFileError, read_file
from sensebatch.image_files import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    ImageFacts,
    UnusableImageError,
    check_image,
)
from sensebatch.jobs import InputImage
from sensebatch.manifest.fields import ImageStruct
from sensebatch.manifest.problems import printable

MAX_CACHED = 4096
"""Images whose facts are remembered within one reading."""
MAX_THREADS = 4
"""How many images are looked at together at most."""
MAX_BYTES_AHEAD = 1 << 24
"""Largest file that is looked at ahead; larger ones have the memory to themselves."""
MAX_PIXELS_AHEAD = 1 << 24
"""Most pixels of an image that is looked at ahead, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probed:
    sha256: str
    facts: ImageFacts


_Kept = TypeVar("_Kept", _Probed, Future[_Probed])


class ImageProbe:
    """Makes input images out of what the rows of a manifest name.

    Args:
        max_pixels: Most pixels an image may have.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        self._probed: OrderedDict[Hashable, _Probed | Future[_Probed]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None

    def look_ahead(self, path: Path, *, as_stored: bool) -> None:
        """Begins to look at the image in a file that `file` will be asked for.

        Args:
            path: The file; nothing is said of one that is not an image.
            as_stored: See `file`.
        """
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        try:
            stat = path.stat()
        except (OSError, ValueError):
            return
        key = _key(path, stat, as_stored)
        if num_threads == 1 or key in self._probed:
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="probe")
        self._keep(key, self._threads.submit(self._read_ahead, path, as_stored))

    def file(self, path: Path, *, as_stored: bool = False) -> InputImage:
        """Returns the input image in a file.

        Args:
            path: The file.
            as_stored: Whether orientation and colour profile are ignored.

        Raises:
            UnusableImageError: There is no such file, or it is not a complete image.
        """
        place = printable(str(path))
        try:
            key = _key(path, path.stat(), as_stored)
            probed = self._remembered(key)
            if probed is None:
                content = read_file(path, MAX_FILE_BYTES)
                probed = self._keep(key, _probe(content, as_stored, self._max_pixels))
        except (UnreadableFileError, UnusableImageError) as error:
            raise UnusableImageError(f"{error}: {place}") from error
        except FileNotFoundError as error:
            raise UnusableImageError(f"expected an image file, found nothing at {place}") from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UnusableImageError(
                f"expected a readable image file at {place}, found: {reason}"
            ) from error
        return _input_image(path, None, probed)

    def member(
        self,
        path: Path,
        member: tuple[int, str, int],
        image: ImageStruct,
        *,
        as_stored: bool = False,
    ) -> InputImage:
        """Returns the input image whose bytes a Parquet manifest holds.

        Raises:
            UnusableImageError: The bytes are not a complete image.
        """
        content = image.content or b""
        key = (hashlib.sha256(content).digest(), as_stored)
        try:
            probed = self._remembered(key)
            if probed is None:
                probed = self._keep(key, _probe(content, as_stored, self._max_pixels))
        except UnusableImageError as error:
            raise UnusableImageError(f"{error} in the bytes of the row") from error
        return _input_image(path, member, probed)

    def _remembered(self, key: Hashable) -> _Probed | None:
        probed = self._probed.get(key)
        if isinstance(probed, Future):
            del self._probed[key]
            # What is wrong with an image, or too large to be looked at ahead, is seen in its turn.
            return None if probed.exception() else self._keep(key, probed.result())
        if probed is not None:
            self._probed.move_to_end(key)
        return probed

    def _keep(self, key: Hashable, probed: _Kept) -> _Kept:
        self._probed[key] = probed
        if len(self._probed) > MAX_CACHED:
            self._probed.popitem(last=False)
        return probed

    def _read_ahead(self, path: Path, as_stored: bool) -> _Probed:
        content = read_file(path, MAX_BYTES_AHEAD)
        return _probe(content, as_stored, min(self._max_pixels, MAX_PIXELS_AHEAD))


def _probe(content: bytes, as_stored: bool, max_pixels: int) -> _Probed:
    facts = check_image(content, as_stored=as_stored, max_pixels=max_pixels)
    return _Probed(sha256=hashlib.sha256(content).hexdigest(), facts=facts)


def _key(path: Path, stat: os.stat_result, as_stored: bool) -> Hashable:
    return (str(path), stat.st_mtime_ns, stat.st_size, as_stored)


def _input_image(path: Path, member: tuple[int, str, int] | None, probed: _Probed) -> InputImage:
    facts = probed.facts
    return InputImage(
        path=str(path),
        member=member,
        sha256=probed.sha256,
        height=facts.height,
        width=facts.width,
        corrections=facts.corrections,
    )
