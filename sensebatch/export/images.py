"""The images of an export: copied as they are encoded, checked, and converted where asked."""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sensebatch.config import OutputConfig
from sensebatch.errors import JobError
from sensebatch.export.samples import ImageFile, Sample, changed_file
from sensebatch.image_files import UnusableImageError, decode_image
from sensebatch.jobs import InputImage
from sensebatch.store.chains import reading
from sensebatch.store.files import reason
from sensebatch.store.images import EXTENSIONS, encode_image, read_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_THREADS = 8
AHEAD = 64
"""Rows that are read before they are written, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is done to images; without any of it, their files are copied byte for byte."""

    image_format: str | None = None
    """`png`, `webp` or `jpeg`."""
    image_quality: int = 95
    max_side: int | None = None
    """Pixels of the longer side, to which larger images are made smaller."""

    @property
    def is_none(self) -> bool:
        """Whether images stay as they are."""
        return self.image_format is None and self.max_side is None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSample:
    """A row with the bytes of its images."""

    sample: Sample
    """Its images are named as they are after the conversion."""
    digest: str
    """The digest of the row before it."""
    images: tuple[bytes, ...]


Sign = Callable[[bytes, ImageFile, Sample, Sequence[tuple[ImageFile, bytes]]], bytes]
"""Returns an encoded image with a signature; see `signing.Signer`."""


class ImageLoader:
    """Reads the images of rows, in threads.

    Args:
        root: The run's folder.
        read_input: Returns the bytes of an input image, or raises a JobError.
        conversion: What is done to each image.
        sign: Signs each image that the run made; None does not.
    """

    def __init__(
        self,
        root: Path,
        read_input: Callable[[InputImage], bytes],
        *,
        conversion: Conversion,
        sign: Sign | None,
    ) -> None:
        self._root = root
        self._read_input = reading(root, read_input)
        self._conversion = conversion
        self._sign = sign
        self._pool = ThreadPoolExecutor(
            min(os.cpu_count() or 1, MAX_THREADS), thread_name_prefix="export"
        )

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def load(self, samples: Iterable[Sample]) -> Iterator[LoadedSample | JobError]:
        """Yields rows in their order; in the place of one that cannot be read, why."""
        waiting: deque[Future[LoadedSample | JobError]] = deque()
        for sample in samples:
            waiting.append(self._pool.submit(self._loaded, sample))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _loaded(self, sample: Sample) -> LoadedSample | JobError:
        try:
            found = [self._image(file) for file in sample.images]
            if self._sign is not None:
                inputs = [pair for pair in found if not pair[0].is_drawn]
                found = [
                    (file, self._sign(content, file, sample, inputs) if file.is_drawn else content)
                    for file, content in found
                ]
        except JobError as error:
            return JobError(f"job {sample.id}: {error}")
        files = tuple(file for file, _ in found)
        images = tuple(content for _, content in found)
        converted = replace(sample, images=files)
        return LoadedSample(sample=converted, digest=sample.digest, images=images)

    def _image(self, file: ImageFile) -> tuple[ImageFile, bytes]:
        content = self._content(file)
        if self._conversion.is_none:
            return file, content
        return _converted(file, content, self._conversion)

    def _content(self, file: ImageFile) -> bytes:
        if not isinstance(file.source, str):
            content = self._read_input(file.source)
            if file.sha256 and hashlib.sha256(content).hexdigest() != file.sha256:
                raise JobError(
                    f"{file.name}: expected the image that the job was made from, found another "
                    "one; the same run makes the job again"
                )
            return content
        try:
            content = (self._root / file.source).read_bytes()
        except OSError as error:
            raise JobError(f"{file.source}: cannot be read: {reason(error)}") from error
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise JobError(changed_file(file.source))
        return content


def _converted(file: ImageFile, content: bytes, conversion: Conversion) -> tuple[ImageFile, bytes]:
    """Returns an image in another format or size, a drawn one with the metadata that it had."""
    import numpy as np

    try:
        image = decode_image(content)
    except UnusableImageError as error:
        raise JobError(f"{file.name}: {error}") from error
    longer = max(image.size)
    ending = PurePosixPath(file.name).suffix
    image_format = conversion.image_format or _FORMATS.get(ending, "png")
    is_small = conversion.max_side is None or longer <= conversion.max_side
    if is_small and ending == f".{EXTENSIONS[image_format]}":
        return file, content
    if not is_small:
        image = _resized(image, conversion.max_side or longer)
    metadata = _metadata(content) if file.is_drawn else None
    output = OutputConfig(
        image_format=image_format,
        image_quality=conversion.image_quality,
        embed_metadata=metadata is not None,
    )
    pixels = np.asarray(image.convert("RGB"))
    name = f"{PurePosixPath(file.name).stem}.{EXTENSIONS[image_format]}"
    return replace(file, name=name), encode_image(pixels, output, metadata or {})


_FORMATS = {f".{ending}": name for name, ending in EXTENSIONS.items()} | {".jpeg": "jpeg"}


def _resized(image: Image, side: int) -> Image:
    from PIL.Image import Resampling

    longer = max(image.size)
    width, height = (max(1, round(length * side / longer)) for length in image.size)
    return image.resize((width, height), Resampling.LANCZOS, reducing_gap=3.0)


def _metadata(content: bytes) -> dict[str, object] | None:
    """Returns what a run embedded in an image; None where nothing is."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            return read_metadata(image)
    except (OSError, ValueError, SyntaxError):
        return None
