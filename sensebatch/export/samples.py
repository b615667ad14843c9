"""One row of an export: the values of a job, and the images that belong to it, as yet unread."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import Any

from sensebatch.dataset.records import Record
from sensebatch.errors import JobError
from sensebatch.export.columns import ANSWER_COLUMNS, LOG_COLUMNS, columns_of
from sensebatch.jobs import IMAGE_MARK, InputImage
from sensebatch.store.provenance import public_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """An encoded image that a row has."""

    name: str
    """Its file name in the export, without a folder."""
    sha256: str
    """The hash of the bytes that the log names."""
    source: str | InputImage
    """Its path in the run's folder, or an input image."""

    @property
    def is_drawn(self) -> bool:
        """Whether the run made it."""
        return isinstance(self.source, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A row of an export."""

    task: str
    values: dict[str, Any]
    """By column. An image is its index in `images`; parts are `type`, `text` and `image`."""
    images: tuple[ImageFile, ...]

    @property
    def id(self) -> str:
        """The job's id."""
        return self.values["id"]

    def canonical(self) -> bytes:
        """Returns all that a reader of the export sees of the row, images by their hashes."""
        seen = [self.task, self.values, [(image.name, image.sha256) for image in self.images]]
        return json.dumps(seen, sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """Hash (32 hex digits) of `canonical`."""
        return hashlib.sha256(self.canonical()).hexdigest()[:32]


def sample_of(record: Record) -> Sample:
    """Returns the row of a job that is done.

    Raises:
        OSError: Its text cannot be read.
        ValueError: Its text is not UTF-8.
        JobError: Its text is not the one that the run wrote.
    """
    row = record.row
    assert row is not None
    job = record.job
    # What the job was made from, which another job may have replaced since.
    made_from = row.get("input_image_sha256") or [image.sha256 for image in job.images]
    inputs = tuple(
        ImageFile(name=_input_name(number, image), sha256=sha256, source=image)
        for number, (image, sha256) in enumerate(zip(job.images, made_from, strict=True))
    )
    drawn = tuple(
        ImageFile(name=PurePosixPath(path).name, sha256=sha256, source=path)
        for path, sha256 in zip(row["image_paths"], row["image_sha256"], strict=True)
    )
    outputs = range(len(inputs), len(inputs) + len(drawn))
    text = _text(record)
    known = {
        **{name: row.get(name) for name in (*LOG_COLUMNS, *ANSWER_COLUMNS)},
        "model": public_name(row["model"]),
        "id": job.id,
        "prompt": job.prompt,
        "instruction": job.prompt,
        "tags": list(record.tags),
        "input_images": list(range(len(inputs))),
        "image": next(iter(outputs), None),
        "output": next(iter(outputs), None),
        "parts": list(_parts(text or "", outputs)),
        "text": text,
        "matrix": _json(record.matrix),
        "metadata": _json(record.metadata),
    }
    values = {column.name: known[column.name] for column in columns_of(job.task)}
    return Sample(task=job.task.value, values=values, images=(*inputs, *drawn))


def _text(record: Record) -> str | None:
    """Returns the text that a job wrote, as it wrote it; None without one."""
    if record.row is None or record.text_file is None:
        return None
    content = record.text_file.read_bytes()
    sha256 = record.row.get("text_sha256")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise JobError(changed_file(record.row["text_path"]))
    return content.decode("utf-8")


def changed_file(path: str) -> str:
    """Returns what is said of a file whose bytes have another hash than the log names.

    Args:
        path: In the run's folder.
    """
    return f"{path}: expected the file that the run wrote, found other bytes"


def _parts(text: str, images: range) -> Iterator[dict[str, Any]]:
    """Yields a story's text as it was written, with an image in the place of each mark."""
    pieces = text.split(IMAGE_MARK, len(images))
    for piece, image in zip_longest(pieces, images):
        if piece:
            yield {"type": "text", "text": piece, "image": None}
        if image is not None:
            yield {"type": "image", "text": None, "image": image}


def _input_name(number: int, image: InputImage) -> str:
    """Returns the name of an input image's file, which nobody chose to be seen."""
    ending = PurePosixPath(image.path).suffix.lower() if image.member is None else ""
    return f"input-{number}{ending if ending.isascii() and ending[1:].isalnum() else ''}"


def _json(values: Any) -> str:
    return json.dumps(dict(values), ensure_ascii=False, sort_keys=True)


def prompt_group(sample: Sample) -> str:
    """Returns what jobs have in common that differ in seed and settings alone.

    It is the same text about the same input images.
    """
    prompt = sample.values.get("prompt", sample.values.get("instruction"))
    inputs = sorted(image.sha256 for image in sample.images if not image.is_drawn)
    return json.dumps([prompt, inputs])
