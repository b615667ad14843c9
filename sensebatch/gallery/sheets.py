"""Thumbnails on sheets of WebP: made in parallel, kept from one gallery to the next.

A sheet is named by what is on it. Images that are on a sheet already stay there; new ones come on
new sheets, together with those of sheets that are half empty, so that sheets stay few whatever was
drawn again. Knows files and their hashes, nothing of jobs.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensebatch.bounded import read_file
from sensebatch.image_files import MAX_FILE_BYTES, UnusableImageError, decode_image
from sensebatch.store.files import reason, write_atomic

if TYPE_CHECKING:
    from PIL import Image

ACROSS = 4
"""Thumbnails in a row of a sheet, and rows. A grid in an order of its own shows one or two images
of many sheets, each of which the browser decodes whole."""
MARGIN = 1
"""Pixels around each thumbnail that repeat its edge, so that scaling mixes in no neighbour."""
PER_SHEET = ACROSS * ACROSS
INDEX = "index.json"

_QUALITY = 80
_FORMAT = 1
"""Raised when sheets are drawn in another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An image that gets a thumbnail."""

    digest: str
    """Hash of its file, which says whether a thumbnail is still that of the image."""
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a thumbnail is."""

    number: int
    """Number of its sheet, times `PER_SHEET`, plus its place on it, row by row."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


@dataclass(slots=True, kw_only=True)
class Sheets:
    """The sheets of a gallery."""

    side: int
    """Pixels of the longer side of a thumbnail."""
    names: list[str] = field(default_factory=list)
    """Files, by the number of the sheet."""
    places: dict[str, Place] = field(default_factory=dict)
    """By the hash of the image's file."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why an image has no thumbnail, by the hash it should have had."""
    num_made: int = 0
    """Thumbnails that were not there yet."""

    @property
    def cell(self) -> int:
        """Pixels from one thumbnail to the next."""
        return self.side + 2 * MARGIN


_Kept = Mapping[str, Sequence[tuple[str, int, int]]]
"""What is on each sheet: hash, width and height of each thumbnail, in their order."""


def make_sheets(
    sources: Iterable[Source],
    folder: Path,
    *,
    side: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> Sheets:
    """Returns the sheets with a thumbnail of each image; draws those that are not there yet.

    Sheets with nothing left on them are removed by `remove_unused`, once no page names them.

    Args:
        sources: The images; those of the same hash share a thumbnail.
        folder: Where the sheets are.
        side: Pixels of the longer side of a thumbnail.
        workers: How many sheets are drawn at once.
        progress: Receives how many of how many missing thumbnails there are.

    Raises:
        OSError: A sheet cannot be written.
    """
    wanted = {source.digest: source for source in sources}
    kept = _worth_keeping(_read_index(folder, side), wanted)
    sheets = Sheets(side=side)
    for name, thumbs in kept.items():
        _add(sheets, name, thumbs, wanted)
    missing = [source for digest, source in wanted.items() if digest not in sheets.places]
    progress(0, len(missing))
    made: dict[str, Sequence[tuple[str, int, int]]] = {}
    try:
        with ThreadPoolExecutor(workers) as pool:
            groups = _groups(missing)
            done = 0
            for name, thumbs, problems in _in_order(pool, _drawing(folder, side), groups, workers):
                done += len(thumbs) + len(problems)
                sheets.problems |= problems
                sheets.num_made += len(thumbs)
                if thumbs:
                    made[name] = thumbs
                    _add(sheets, name, thumbs, wanted)
                progress(done, len(missing))
    finally:
        # Whoever is stopped here does not begin again from nothing.
        _write_index(folder, side, {**kept, **made})
    return sheets


def remove_unused(sheets: Sheets, folder: Path) -> None:
    """Removes the sheets that a gallery no longer has."""
    names = set(sheets.names)
    for path in folder.glob("*.webp"):
        if path.name not in names:
            with suppress(OSError):
                path.unlink()


def fitted(content: bytes, side: int) -> Image.Image:
    """Returns an image's pixels, brought within a square without enlarging them.

    Raises:
        UnusableImageError: It cannot be decoded.
    """
    from PIL import Image

    image = decode_image(content, corrections="").convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


def _worth_keeping(there: _Kept, wanted: Mapping[str, Source]) -> _Kept:
    """Returns the sheets that stay: all that are used, but for those to be put together."""
    used = {
        name: num_used
        for name, thumbs in there.items()
        if (num_used := sum(digest in wanted for digest, _, _ in thumbs))
    }
    half_empty = {name for name, num_used in used.items() if 2 * num_used <= PER_SHEET}
    if len(half_empty) == 1 and sum(used.values()) == len(wanted):
        # There is nothing that it could be put together with.
        half_empty = set()
    return {name: there[name] for name in used if name not in half_empty}


def _groups(sources: Sequence[Source]) -> Iterator[Sequence[Source]]:
    for start in range(0, len(sources), PER_SHEET):
        yield sources[start : start + PER_SHEET]


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[Sequence[Source]], Any],
    groups: Iterator[Sequence[Source]],
    workers: int,
) -> Iterator[Any]:
    """Yields results in their order, with few groups under way, so that a stop ends soon."""
    pending = [pool.submit(work, group) for group in islice(groups, 2 * workers)]
    try:
        while pending:
            yield pending.pop(0).result()
            pending += [pool.submit(work, group) for group in islice(groups, 1)]
    finally:
        for future in pending:
            future.cancel()


def _drawing(folder: Path, side: int) -> Callable[[Sequence[Source]], Any]:
    return lambda group: _draw(group, folder, side)


def _draw(
    group: Sequence[Source], folder: Path, side: int
) -> tuple[str, list[tuple[str, int, int]], dict[str, str]]:
    """Draws a sheet; returns its name, what is on it, and why images are not."""
    from PIL import Image

    cell = side + 2 * MARGIN
    sheet = Image.new("RGB", (ACROSS * cell, ACROSS * cell), (128, 128, 128))
    thumbs: list[tuple[str, int, int]] = []
    problems: dict[str, str] = {}
    for source in group:
        try:
            thumb = fitted(read_file(source.path, MAX_FILE_BYTES), side)
        except (OSError, UnusableImageError) as error:
            words = reason(error) if isinstance(error, OSError) else str(error)
            problems[source.digest] = f"{source.path}: {words}"
            continue
        left, top = len(thumbs) % ACROSS * cell, len(thumbs) // ACROSS * cell
        for x, y in ((0, 1), (2, 1), (1, 0), (1, 2), (1, 1)):
            sheet.paste(thumb, (left + x * MARGIN, top + y * MARGIN))
        thumbs.append((source.digest, thumb.width, thumb.height))
    if not thumbs:
        return "", thumbs, problems
    said = "\n".join([f"{_FORMAT} {side}", *(digest for digest, _, _ in thumbs)])
    name = f"{hashlib.sha256(said.encode()).hexdigest()[:20]}.webp"
    content = io.BytesIO()
    sheet.save(content, "WEBP", quality=_QUALITY, method=2)
    write_atomic(folder / name, content.getvalue())
    return name, thumbs, problems


def _add(
    sheets: Sheets,
    name: str,
    thumbs: Sequence[tuple[str, int, int]],
    wanted: Mapping[str, Source],
) -> None:
    start = len(sheets.names) * PER_SHEET
    sheets.names.append(name)
    for number, (digest, width, height) in enumerate(thumbs):
        if digest in wanted:
            sheets.places[digest] = Place(number=start + number, width=width, height=height)


def _read_index(folder: Path, side: int) -> _Kept:
    """Returns what is on the sheets that are there; nothing where that cannot be known."""
    try:
        read = json.loads((folder / INDEX).read_bytes())
        if (read["format"], read["side"]) != (_FORMAT, side):
            return {}
        return {
            name: [(str(digest), int(width), int(height)) for digest, width, height in thumbs]
            for name, thumbs in read["sheets"].items()
            if (folder / name).is_file()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(folder: Path, side: int, sheets: _Kept) -> None:
    content = {"format": _FORMAT, "side": side, "sheets": sheets}
    write_atomic(folder / INDEX, json.dumps(content, separators=(",", ":")).encode())
