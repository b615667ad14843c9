"""The kept images: finished images of jobs whose batch is not committed yet, exact to the bit.

The images of a batch that were drawn together are one file, a round, in a folder of the batch's
own. A batch that runs again in the same composition takes its own rounds. A job that ends up in
another batch, because its old one was split or planned again, takes the images that its old batch
left behind: they are just as exact, but what follows them is then computed among other neighbours.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from sensebatch.contract import Drawn, KeptImage
from sensebatch.jobs import Batch
from sensebatch.store.files import atomic_file, storage_errors, sync_folders

_LOGGER = logging.getLogger(__name__)

_DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError)

_DTYPES = {"float32": "F32", "int64": "I64"}
"""What safetensors calls the dtypes of a round."""
_COMPOSITION, _CHECKSUM = "composition", "crc32"
"""Keys of a file's metadata: whose images it has, and the CRC-32 of that and of all tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """One file: the batch it belongs to and the images drawn together."""

    members: list[tuple[str, str]]
    """(id, key) of each job of the batch."""
    drawn: Drawn


class KeptImages:
    """The kept images of a run's folder.

    Args:
        folder: Where they are; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of_batch(self, seq: int, batch: Batch) -> KeptOfBatch:
        """Returns the kept images of the started batch with this number."""
        return KeptOfBatch(self, self._folder / str(seq), batch)

    def num_rounds(self, seq: int) -> int:
        """Returns how many rounds are kept of the batch with this number."""
        return len(list((self._folder / str(seq)).glob("*.safetensors")))

    def discard(self, seq: int, is_needed: Callable[[int, Sequence[str]], bool]) -> None:
        """Removes what a committed batch kept, and what no job can still use.

        Args:
            seq: The batch's number.
            is_needed: Whether the batch with this number is under way, or one of the jobs with
                these ids is still to be run.
        """
        shutil.rmtree(self._folder / str(seq), ignore_errors=True)
        self.discard_unneeded(is_needed)

    def discard_unneeded(self, is_needed: Callable[[int, Sequence[str]], bool]) -> None:
        """Removes what no job can still use; see `discard`."""
        for folder in self._folders():
            if not is_needed(int(folder.name), [job_id for job_id, _ in _members(folder)]):
                shutil.rmtree(folder, ignore_errors=True)

    def left_behind(self, members: Sequence[tuple[str, str]], own: Path) -> list[list[KeptImage]]:
        """Returns, for each (id, key), the images that another batch kept of it.

        Where several batches kept some, those of the one that kept the most.
        """
        wanted = set(members)
        best: dict[tuple[str, str], list[KeptImage]] = {}
        for folder in self._folders():
            if folder == own or wanted.isdisjoint(_members(folder)):
                continue
            found: dict[tuple[str, str], list[KeptImage]] = {}
            for kept in _read_rounds(folder):
                for index, image in kept.drawn:
                    found.setdefault(kept.members[index], []).append(image)
            for member, images in found.items():
                if len(images) > len(best.get(member, [])):
                    best[member] = images
        return [best.get(member, []) for member in members]

    def compositions(self) -> Iterator[tuple[int, list[tuple[str, str]]]]:
        """Yields the number of each batch that kept images, and (id, key) of each of its jobs."""
        for folder in self._folders():
            yield int(folder.name), _members(folder)

    def num_images(self, is_to_run: Callable[[str, str], bool]) -> int:
        """Returns how many images are kept; reads none of them, and works while a run writes.

        An image that another batch took over, or that was drawn again, counts once.

        Args:
            is_to_run: Whether a job with this id and key is still to be run. Images of other
                jobs, kept beside those of jobs they shared a batch with, do not count.
        """
        names = {name for folder in self._folders() for name in _image_names(folder)}
        return sum(is_to_run(*member) for member, _ in names)

    def _folders(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(folder for folder in self._folder.iterdir() if folder.name.isdigit())


class KeptOfBatch:
    """The kept images of one started batch; kept by its number."""

    def __init__(self, store: KeptImages, folder: Path, batch: Batch) -> None:
        self._store = store
        self._folder = folder
        self._members = [(job.id, key) for job, key in zip(batch.jobs, batch.keys, strict=True)]
        self._num_rounds: int | None = None

    def load(self) -> list[list[KeptImage]]:
        """Returns the images kept for each job of the batch, in the batch's order.

        Raises:
            StorageFullError: The disk is full, so images of another batch cannot be taken over.
            StorageError: The folder cannot be written.
        """
        images: list[list[KeptImage]] = [[] for _ in self._members]
        self._num_rounds = 0
        for kept in _read_rounds(self._folder):
            if kept.members != self._members:
                break
            self._num_rounds += 1
            for index, image in kept.drawn:
                images[index].append(image)
        self._remove_from(self._num_rounds)
        return images if self._num_rounds else self._take_over()

    def save(self, drawn: Drawn) -> None:
        """Keeps the images that were drawn together, as (job's index, image); all of them or none.

        Raises:
            StorageFullError: The disk is full.
            StorageError: The folder cannot be written.
        """
        if self._num_rounds is None:
            self.load()
        assert self._num_rounds is not None
        images = [np.ascontiguousarray(kept.image, dtype=np.float32) for _, kept in drawn]
        tokens = [np.array(kept.tokens, dtype=np.int64) for _, kept in drawn]
        composition = json.dumps(
            {"members": self._members, "indexes": [index for index, _ in drawn]}
        )
        metadata = {_COMPOSITION: composition, _CHECKSUM: _checksum(composition, images, tokens)}
        tensors: dict[str, np.ndarray] = {
            f"image.{place}": image for place, image in enumerate(images)
        }
        tensors |= {f"tokens.{place}": own for place, own in enumerate(tokens)}
        path = _round_path(self._folder, self._num_rounds)
        with atomic_file(path) as file:
            _write(file, tensors, metadata)
        sync_folders([path], self._folder.parent.parent)
        self._num_rounds += 1

    def _take_over(self) -> list[list[KeptImage]]:
        """Makes the images that other batches left behind this batch's first round.

        They are one file, so that a kill leaves all of them or none.
        """
        images = self._store.left_behind(self._members, self._folder)
        drawn = [(index, image) for index, own in enumerate(images) for image in own]
        if drawn:
            self.save(drawn)
        return images

    def _remove_from(self, number: int) -> None:
        """Removes rounds that cannot be used, so that they never end up after new ones."""
        if self._folder.is_dir():
            with storage_errors(self._folder):
                for path in sorted(self._folder.glob("*.safetensors")):
                    if path >= _round_path(self._folder, number):
                        path.unlink()


def _round_path(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.safetensors"


def _write(file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes tensors as a safetensors file, straight from where they lie.

    The library copies them first, several times over and with the interpreter to itself: a third of
    a second for a pass of large images, in which nobody launches anything for the device.

    Source: the format's description in the README of huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        dtype = _DTYPES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for array in tensors.values():
        file.write(array.data)


def _read_rounds(folder: Path) -> Iterator[_Round]:
    """Yields the rounds of a folder in order, up to the first that is missing or damaged."""
    number = 0
    while (path := _round_path(folder, number)).is_file():
        try:
            yield _read_round(path)
        except _DAMAGED as error:
            _LOGGER.warning("%s: damaged and ignored, its images are drawn again: %s", path, error)
            return
        number += 1


def _read_round(path: Path) -> _Round:
    with safe_open(path, framework="np") as file:
        members, indexes = _composition(file)
        images = [file.get_tensor(f"image.{place}") for place in range(len(indexes))]
        tokens = [file.get_tensor(f"tokens.{place}") for place in range(len(indexes))]
        metadata = file.metadata()
    if not all(0 <= index < len(members) for index in indexes):
        raise ValueError("expected images of the batch's jobs")
    if any(image.dtype != np.float32 for image in images):
        raise ValueError("expected float32 images")
    # Earlier versions wrote no checksum.
    expected = metadata.get(_CHECKSUM)
    found = _checksum(metadata[_COMPOSITION], images, tokens)
    if expected not in (None, found):
        raise ValueError(f"expected the checksum {expected}, found {found}")
    drawn = [
        (index, KeptImage(image=image, tokens=tuple(own.tolist())))
        for index, image, own in zip(indexes, images, tokens, strict=True)
    ]
    return _Round(members=members, drawn=drawn)


def _checksum(composition: str, images: Iterable[np.ndarray], tokens: Iterable[np.ndarray]) -> str:
    """Returns the CRC-32 of everything a round says, as 8 hex digits."""
    found = zlib.crc32(composition.encode())
    for array in (*images, *tokens):
        found = zlib.crc32(array.data, found)
    return f"{found:08x}"


def _members(folder: Path) -> list[tuple[str, str]]:
    """Returns (id, key) of each job of the batch that made a folder; reads no image."""
    try:
        with safe_open(_round_path(folder, 0), framework="np") as file:
            return _composition(file)[0]
    except _DAMAGED:
        return []


def _image_names(folder: Path) -> Iterator[tuple[tuple[str, str], bytes]]:
    """Yields job and text of each image of a folder, up to the first damaged file."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                members, indexes = _composition(file)
                tokens = [file.get_tensor(f"tokens.{place}") for place in range(len(indexes))]
                names = [
                    (members[index], text.tobytes())
                    for index, text in zip(indexes, tokens, strict=True)
                ]
        except (*_DAMAGED, IndexError):
            return
        yield from names


def _composition(file: Any) -> tuple[list[tuple[str, str]], list[int]]:
    """Returns (id, key) of each job of an open round's batch, and the job's index of each image."""
    composition = json.loads((file.metadata() or {})[_COMPOSITION])
    return [(job_id, key) for job_id, key in composition["members"]], composition["indexes"]
