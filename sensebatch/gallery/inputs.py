"""Input images as a page shows them: where they are if a browser can, else converted."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from sensebatch.errors import JobError
from sensebatch.image_files import UnusableImageError, decode_image
from sensebatch.jobs import InputImage
from sensebatch.manifest.inputs import InputReader
from sensebatch.store.files import reason, sha256_of, write_atomic

FOLDER = "inputs"
"""Where a gallery keeps converted inputs."""
MAX_SIDE = 2048
"""Pixels of the longer side of a converted input."""
SHOWN_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".bmp"])
"""Files that browsers show."""

_QUALITY = 85


class Inputs:
    """Finds or makes what is shown of input images.

    Args:
        out: The gallery's folder.
        is_copied: Whether all of them come into the gallery, so that it can be moved.
    """

    def __init__(self, out: Path, *, is_copied: bool) -> None:
        self._out = out
        self._is_copied = is_copied
        self._reader = InputReader()
        self._known: dict[str, Mapping[str, str]] = {}
        self.names: set[str] = set()
        """The files that the gallery has of its own."""

    def shown(self, image: InputImage, root: Path) -> Mapping[str, str]:
        """Returns an input image's name with its address, or with why it has none.

        Args:
            image: The input image.
            root: The run's folder, near which it is looked for if it is not where its path says.
        """
        place = f"{root} {image.path} {image.member} {image.key}"
        if place not in self._known:
            name = PurePosixPath(image.path).name
            if image.member is not None:
                name = f"{name}, row {image.member[0]}"
            found = replace(image, path=str(_located(image, root)))
            self._known[place] = {"name": name, **self._found(found)}
        return self._known[place]

    def close(self) -> None:
        """Closes the open Parquet file, if there is one."""
        self._reader.close()

    def _found(self, image: InputImage) -> Mapping[str, str]:
        path = Path(image.path)
        is_shown = image.member is None and path.suffix.lower() in SHOWN_SUFFIXES
        # What decoding corrects, a browser might not: it is shown as the model saw it.
        if is_shown and not image.corrections and not self._is_copied:
            return {"url": address(path, self._out)}
        name = f"{hashlib.sha256(image.key.encode()).hexdigest()[:20]}.webp"
        file = self._out / FOLDER / name
        if not file.is_file():
            try:
                content = self._converted(image)
            except (JobError, UnusableImageError) as error:
                return {"problem": str(error)}
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, content)
        self.names.add(name)
        return {"url": f"{FOLDER}/{name}"}

    def _converted(self, image: InputImage) -> bytes:
        from PIL import Image

        try:
            content = self._reader.read(image)
        except OSError as error:
            raise JobError(f"{image.path}: {reason(error)}") from error
        pixels = decode_image(content, corrections=image.corrections).convert("RGB")
        pixels.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
        written = io.BytesIO()
        pixels.save(written, "WEBP", quality=_QUALITY)
        return written.getvalue()


def _located(image: InputImage, root: Path) -> Path:
    """Returns where an input image is.

    Paths are relative to the folder that the run was started in, which is most often one above the
    run's own. What is found there must be the file that the job was planned with. An image that
    another job has made is in the run's folder.
    """
    path = Path(image.path)
    if image.output is not None:
        return root / path
    if path.is_absolute() or path.exists():
        return path
    for folder in root.absolute().parents:
        found = folder / path
        is_same = image.member is not None or sha256_of(found) == image.sha256
        if found.is_file() and is_same:
            return found
    return path


def address(path: Path, out: Path) -> str:
    """Returns the address of a file or folder as a page in a folder names it."""
    try:
        relative = os.path.relpath(path.absolute(), out.absolute())
    except ValueError:  # another drive of Windows
        return path.absolute().as_uri()
    return quote(os.fsencode(PurePosixPath(Path(relative).as_posix())))
