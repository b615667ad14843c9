"""Tar files as WebDataset reads them: the files of a row one after the other, under one key."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any

from sensebatch.export.columns import Kind, columns_of
from sensebatch.export.images import LoadedSample
from sensebatch.export.ledger import Shard
from sensebatch.export.names import ending_of
from sensebatch.export.shards import Limits
from sensebatch.export.target import Target
from sensebatch.tasks import Task

MAX_ROWS = 10_000
"""The most rows of a shard, as is usual."""


def limits(shard_bytes: int) -> Limits:
    """Returns how much goes into a shard."""
    return Limits(num_bytes=shard_bytes, num_rows=MAX_ROWS)


def pattern(task: str, split: str) -> str:
    """Returns which files of an export are those of a task and split."""
    return f"{task}/{split}-*.tar"


def is_own(name: str, task: str) -> bool:
    """Returns whether an export of this format may have made a file of this name."""
    return re.fullmatch(rf"{task}/\.?[\w.]+-\d{{5,}}\.tar(\.tmp)?", name) is not None


def write(target: Target, shard: Shard, samples: Iterator[LoadedSample]) -> dict[str, int]:
    """Writes a shard and returns the bytes of its files by name."""
    name = f"{shard.stem}.tar"
    with target.write(name) as file:
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for number, loaded in enumerate(samples):
                # A key is unique in its split, and has no dot, at which readers cut.
                key = f"{shard.number:05d}{number:04d}"
                for ending, content in _members(loaded):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        num_bytes = file.tell()
    return {name: num_bytes}


def _members(loaded: LoadedSample) -> Iterator[tuple[str, bytes]]:
    """Yields the files of a row by what follows their key."""
    sample = loaded.sample
    endings = _endings(sample.images)
    yield from zip(endings, loaded.images, strict=True)
    values: dict[str, Any] = {}
    for column in columns_of(Task(sample.task)):
        value = sample.values[column.name]
        match column.kind:
            case Kind.VALUE:
                values[column.name] = value
            case Kind.IMAGE:
                values[column.name] = None if value is None else endings[value]
            case Kind.IMAGES:
                values[column.name] = [endings[index] for index in value]
            case Kind.PARTS:
                values[column.name] = [
                    {**part, "image": None if part["image"] is None else endings[part["image"]]}
                    for part in value
                ]
    yield "txt", str(values.get("prompt", values.get("instruction"))).encode()
    yield "json", json.dumps(values, ensure_ascii=False).encode()


def _endings(images: Any) -> list[str]:
    """Returns what follows the key of each image: `png` for the one that a job made."""
    num_drawn = sum(image.is_drawn for image in images)
    endings = []
    for index, image in enumerate(images):
        kind = ending_of(image.name)[1:] or "bin"
        if not image.is_drawn:
            endings.append(f"input{index}.{kind}")
        elif num_drawn == 1:
            endings.append(kind)
        else:
            endings.append(f"{index - len(images) + num_drawn}.{kind}")
    return endings
