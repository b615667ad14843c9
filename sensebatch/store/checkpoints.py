"""Finished pictures of jobs whose batch is not committed yet, exact to the bit.

The pictures of a batch that were drawn in one pass are one file, a round, in a folder of the
batch's own. A batch that is run again in the same composition takes its own rounds. A job that
finds itself in another batch, because its old one was split or planned anew, takes the pictures
its old batch left behind: they are as exact, but what follows them is then computed among
other neighbours.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sensebatch.contract import DrawnImage
from sensebatch.jobs import Batch
from sensebatch.store.files import storage_errors, sync_folders, write_atomic

_LOGGER = logging.getLogger(__name__)

_DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError)

Drawn = Sequence[tuple[int, DrawnImage]]
"""Pictures of one round, as (job's index in its batch, picture)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """One file: the batch it belongs to and the pictures drawn together."""

    members: list[tuple[str, str]]
    """(id, key) of each job of the batch."""
    drawn: Drawn


class CheckpointStore:
    """The checkpoints of a run's folder.

    Args:
        folder: Where they lie; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of_batch(self, seq: int, batch: Batch) -> BatchCheckpoints:
        """Returns the checkpoints of the started batch with this number."""
        return BatchCheckpoints(self, self._folder / str(seq), batch)

    def discard(self, seq: int, is_needed: Callable[[int, Sequence[str]], bool]) -> None:
        """Removes what a committed batch kept, and what no job can use any more.

        Args:
            seq: The batch's number.
            is_needed: Whether the batch with this number is under way, or one of the jobs with
                these ids is still to be run.
        """
        shutil.rmtree(self._folder / str(seq), ignore_errors=True)
        self.discard_unneeded(is_needed)

    def discard_unneeded(self, is_needed: Callable[[int, Sequence[str]], bool]) -> None:
        """Deletes what no batch needs any more; see `discard`."""
        for folder in self._folders():
            if not is_needed(int(folder.name), [job_id for job_id, _ in _members(folder)]):
                shutil.rmtree(folder, ignore_errors=True)

    def left_behind(self, members: Sequence[tuple[str, str]], own: Path) -> list[list[DrawnImage]]:
        """Returns, for each (id, key), the most pictures that another batch's folder has of it."""
        wanted = set(members)
        best: dict[tuple[str, str], list[DrawnImage]] = {}
        for folder in self._folders():
            if folder == own or wanted.isdisjoint(_members(folder)):
                continue
            found: dict[tuple[str, str], list[DrawnImage]] = {}
            for kept in _read_rounds(folder):
                for index, picture in kept.drawn:
                    found.setdefault(kept.members[index], []).append(picture)
            for member, pictures in found.items():
                if len(pictures) > len(best.get(member, [])):
                    best[member] = pictures
        return [best.get(member, []) for member in members]

    def num_images(self, is_to_run: Callable[[str, str], bool]) -> int:
        """Returns how many pictures are kept; reads none, and works beside a run.

        One that another batch took over, or that was drawn again, counts once.

        Args:
            is_to_run: Whether a job with this id and key is still to be run; pictures of others,
                which lie beside those of jobs that they shared a batch with, do not count.
        """
        names = {name for folder in self._folders() for name in _picture_names(folder)}
        return sum(is_to_run(*member) for member, _ in names)

    def _folders(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(folder for folder in self._folder.iterdir() if folder.name.isdigit())


class BatchCheckpoints:
    """The checkpoints of one started batch; what the engine is given as `Checkpoints`."""

    def __init__(self, store: CheckpointStore, folder: Path, batch: Batch) -> None:
        self._store = store
        self._folder = folder
        self._members = [(job.id, key) for job, key in zip(batch.jobs, batch.keys, strict=True)]
        self._num_rounds: int | None = None

    def load(self) -> list[list[DrawnImage]]:
        """Returns the pictures kept for each job of the batch, in the batch's order.

        Raises:
            StorageFullError: The disk is full, so that pictures of another batch cannot be kept.
            RunFolderError: The folder cannot be written.
        """
        pictures: list[list[DrawnImage]] = [[] for _ in self._members]
        self._num_rounds = 0
        for kept in _read_rounds(self._folder):
            if kept.members != self._members:
                break
            self._num_rounds += 1
            for index, picture in kept.drawn:
                pictures[index].append(picture)
        self._remove_from(self._num_rounds)
        return pictures if self._num_rounds else self._take_over()

    def save(self, drawn: Drawn) -> None:
        """Keeps the pictures that were denoised together, as (job's index, picture); atomic.

        Raises:
            StorageFullError: The disk is full.
            RunFolderError: The folder cannot be written.
        """
        if self._num_rounds is None:
            self.load()
        assert self._num_rounds is not None
        tensors: dict[str, np.ndarray] = {}
        for place, (_, picture) in enumerate(drawn):
            tensors[f"image.{place}"] = np.ascontiguousarray(picture.image, dtype=np.float32)
            tensors[f"tokens.{place}"] = np.array(picture.tokens, dtype=np.int64)
        composition = {
            "members": self._members,
            "indexes": [index for index, _ in drawn],
        }
        path = _round_path(self._folder, self._num_rounds)
        write_atomic(path, save(tensors, {"composition": json.dumps(composition)}))
        sync_folders([path], self._folder.parent.parent)
        self._num_rounds += 1

    def _take_over(self) -> list[list[DrawnImage]]:
        """Makes the pictures that other batches left behind this batch's first file.

        One file, so that a kill leaves all of them or none.
        """
        pictures = self._store.left_behind(self._members, self._folder)
        drawn = [(index, picture) for index, own in enumerate(pictures) for picture in own]
        if drawn:
            self.save(drawn)
        return pictures

    def _remove_from(self, number: int) -> None:
        """Removes rounds that cannot be used, so that they never follow new ones."""
        if self._folder.is_dir():
            with storage_errors(self._folder):
                for path in sorted(self._folder.glob("*.safetensors")):
                    if path >= _round_path(self._folder, number):
                        path.unlink()


def _round_path(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.safetensors"


def _read_rounds(folder: Path) -> Iterator[_Round]:
    """Yields the rounds of a folder in order, up to the first that is missing or damaged."""
    number = 0
    while (path := _round_path(folder, number)).is_file():
        try:
            yield _read_round(path)
        except _DAMAGED as error:
            _LOGGER.warning(
                "%s: damaged and ignored, its pictures are drawn again: %s", path, error
            )
            return
        number += 1


def _read_round(path: Path) -> _Round:
    with safe_open(path, framework="np") as file:
        members, indexes = _composition(file)
        drawn = []
        for place, index in enumerate(indexes):
            tokens = file.get_tensor(f"tokens.{place}")
            image = file.get_tensor(f"image.{place}")
            if image.dtype != np.float32 or not 0 <= index < len(members):
                raise ValueError("expected float32 pictures of the batch's jobs")
            drawn.append((index, DrawnImage(image=image, tokens=tuple(tokens.tolist()))))
    return _Round(members=members, drawn=drawn)


def _members(folder: Path) -> list[tuple[str, str]]:
    """Returns (id, key) of each job of the batch that made a folder; reads no picture."""
    try:
        with safe_open(_round_path(folder, 0), framework="np") as file:
            return _composition(file)[0]
    except _DAMAGED:
        return []


def _picture_names(folder: Path) -> Iterator[tuple[tuple[str, str], bytes]]:
    """Yields job and text of each picture of a folder, up to the first damaged file."""
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
    """Returns (id, key) of each job of an open round's batch, and the index of each picture's."""
    composition = json.loads((file.metadata() or {})["composition"])
    return [(job_id, key) for job_id, key in composition["members"]], composition["indexes"]
