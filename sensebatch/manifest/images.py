"""Looks at input images: that they decode, how large they are, and the hash of their bytes.

Each file is read once, however many jobs use it. Nothing is resized here.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING

from sensebatch.jobs import InputImage
from sensebatch.manifest.fields import ImageStruct

if TYPE_CHECKING:
    from PIL import Image

MAX_CACHED = 4096
"""Pictures whose facts are remembered within one reading."""

_DECODER_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's decoders raise on damaged files."""


class UnusableImageError(Exception):
    """Why a picture cannot be an input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    sha256: str
    height: int
    width: int


class ImageProbe:
    """Makes input images out of what the rows of a manifest name."""

    def __init__(self) -> None:
        self._facts: OrderedDict[Hashable, _Facts] = OrderedDict()

    def file(self, path: Path) -> InputImage:
        """Returns the input image in a file.

        Raises:
            UnusableImageError: There is no such file, or it is no complete picture.
        """
        try:
            stat = path.stat()
            # A pipe has nothing left when the job is run, and may never end.
            if not (S_ISREG(stat.st_mode) or S_ISDIR(stat.st_mode)):
                raise UnusableImageError(
                    f"expected an image file, found a device or pipe at {path}"
                )
            key = (str(path), stat.st_mtime_ns, stat.st_size)
            facts = self._remembered(key)
            if facts is None:
                facts = self._remember(key, path.read_bytes())
        except FileNotFoundError as error:
            raise UnusableImageError(f"expected an image file, found nothing at {path}") from error
        except IsADirectoryError as error:
            raise UnusableImageError(f"expected an image file, found a folder at {path}") from error
        except (OSError, ValueError) as error:
            raise UnusableImageError(
                f"expected a readable image file at {path}, found: {error}"
            ) from error
        return InputImage(
            path=str(path), sha256=facts.sha256, height=facts.height, width=facts.width
        )

    def member(self, path: Path, member: tuple[int, str, int], image: ImageStruct) -> InputImage:
        """Returns the input image whose bytes a Parquet manifest holds.

        Raises:
            UnusableImageError: The bytes are no complete picture.
        """
        content = image.content or b""
        key = hashlib.sha256(content).digest()
        try:
            facts = self._remembered(key) or self._remember(key, content)
        except UnusableImageError as error:
            raise UnusableImageError(f"{error} in the bytes of the row") from error
        return InputImage(
            path=str(path),
            member=member,
            sha256=facts.sha256,
            height=facts.height,
            width=facts.width,
        )

    def _remembered(self, key: Hashable) -> _Facts | None:
        facts = self._facts.get(key)
        if facts is not None:
            self._facts.move_to_end(key)
        return facts

    def _remember(self, key: Hashable, content: bytes) -> _Facts:
        width, height = check_picture(content)
        facts = _Facts(sha256=hashlib.sha256(content).hexdigest(), height=height, width=width)
        self._facts[key] = facts
        if len(self._facts) > MAX_CACHED:
            self._facts.popitem(last=False)
        return facts


def check_picture(content: bytes) -> tuple[int, int]:
    """Returns (width, height) of an encoded picture after making sure that all of it is there.

    Raises:
        UnusableImageError: It is no picture, or a damaged one, or too large to decode.
    """
    # Manifests without input images are read sooner without it.
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                size = image.size
                _read_all(image)
    except UnidentifiedImageError as error:
        raise UnusableImageError("expected a picture, found something else") from error
    except Image.DecompressionBombError as error:
        raise UnusableImageError(f"expected a smaller picture, found: {error}") from error
    except _DECODER_ERRORS as error:
        raise UnusableImageError(
            f"expected a complete picture, found a damaged one: {error}"
        ) from error
    return size


def _read_all(image: Image.Image) -> None:
    """Reads every byte of a picture, in the cheapest way that notices a missing one."""
    if image.format == "PNG":
        image.verify()
        return
    if image.format in ("JPEG", "MPO"):
        # An eighth of the size costs an eighth of the transform, yet decodes the whole stream.
        image.draft("L", (image.width // 8, image.height // 8))
    image.load()
