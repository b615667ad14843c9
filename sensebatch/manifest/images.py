"""Looks at input images: that they decode, how large they are, and the hash of their bytes.

Each file is read once, however many jobs use it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probed:
    sha256: str
    facts: ImageFacts


class ImageProbe:
    """Makes input images out of what the rows of a manifest name.

    Args:
        max_pixels: Most pixels an image may have.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        self._probed: OrderedDict[Hashable, _Probed] = OrderedDict()

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
            stat = path.stat()
            key = (str(path), stat.st_mtime_ns, stat.st_size, as_stored)
            probed = self._remembered(key)
            if probed is None:
                probed = self._remember(key, read_file(path, MAX_FILE_BYTES), as_stored=as_stored)
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
            probed = self._remembered(key) or self._remember(key, content, as_stored=as_stored)
        except UnusableImageError as error:
            raise UnusableImageError(f"{error} in the bytes of the row") from error
        return _input_image(path, member, probed)

    def _remembered(self, key: Hashable) -> _Probed | None:
        probed = self._probed.get(key)
        if probed is not None:
            self._probed.move_to_end(key)
        return probed

    def _remember(self, key: Hashable, content: bytes, *, as_stored: bool) -> _Probed:
        facts = check_image(content, as_stored=as_stored, max_pixels=self._max_pixels)
        probed = _Probed(sha256=hashlib.sha256(content).hexdigest(), facts=facts)
        self._probed[key] = probed
        if len(self._probed) > MAX_CACHED:
            self._probed.popitem(last=False)
        return probed


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
