"""Folders of image files with a `metadata.parquet` beside them, as `imagefolder` reads them.

Columns of images become columns of file names, from which `datasets` makes images again:
`file_name` for `image`, `output_file_name` for `output`, `input_images_file_names`, and so on.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sensebatch.export.columns import Column, Kind, columns_of
from sensebatch.export.images import LoadedSample
from sensebatch.export.ledger import Shard
from sensebatch.export.names import ending_of, sample_name
from sensebatch.export.shards import Limits
from sensebatch.export.target import Target
from sensebatch.tasks import Task

MAX_IMAGES = 9_000
"""The most images of a folder; the Hub takes fewer than 10,000 files in one."""
METADATA = "metadata.parquet"

_IMAGE = "image"
_PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.int32())])


def limits(shard_bytes: int) -> Limits:
    """Returns how much goes into a shard."""
    return Limits(num_bytes=shard_bytes, num_images=MAX_IMAGES)


def pattern(task: str, split: str) -> str:
    """Returns which files of an export are those of a task and split."""
    return f"{task}/{split}-*/*"


def is_own(name: str, task: str) -> bool:
    """Returns whether an export of this format may have made a file of this name."""
    return re.fullmatch(rf"{task}/[\w.]+-\d{{5,}}/[^/]+", name) is not None


def write(target: Target, shard: Shard, samples: Iterator[LoadedSample]) -> dict[str, int]:
    """Writes a shard and returns the bytes of its files by name."""
    columns = columns_of(Task(shard.task))
    files: dict[str, int] = {}
    rows = []
    for number, loaded in enumerate(samples):
        names = _names(loaded, number)
        for name, content in zip(names, loaded.images, strict=True):
            target.write_loose(f"{shard.stem}/{name}", content)
            files[f"{shard.stem}/{name}"] = len(content)
        rows.append(_row(columns, loaded, names))
    content = _parquet(rows, _schema(columns))
    target.write_loose(f"{shard.stem}/{METADATA}", content)
    files[f"{shard.stem}/{METADATA}"] = len(content)
    target.settle()
    return files


def _names(loaded: LoadedSample, number: int) -> list[str]:
    """Returns a file name for each image of a row."""
    stem = sample_name(loaded.sample.id, number)
    images = loaded.sample.images
    drawn = [image for image in images if image.is_drawn]
    names = []
    for index, image in enumerate(images):
        if not image.is_drawn:
            kind = f"-input{index}"
        else:
            kind = "" if len(drawn) == 1 else f"-{index - len(images) + len(drawn)}"
        names.append(f"{stem}{kind}{ending_of(image.name)}")
    return names


def _row(columns: tuple[Column, ...], loaded: LoadedSample, names: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in columns:
        value = loaded.sample.values[column.name]
        match column.kind:
            case Kind.IMAGE:
                row[_file_column(column)] = None if value is None else names[value]
            case Kind.IMAGES:
                row[_file_column(column)] = [names[index] for index in value]
            case Kind.PARTS:
                drawn = sorted({part["image"] for part in value} - {None})
                row[_file_column(column)] = [names[index] for index in drawn]
                row[column.name] = [
                    {**part, "image": None if part["image"] is None else drawn.index(part["image"])}
                    for part in value
                ]
            case Kind.VALUE:
                row[column.name] = value
    return row


def _schema(columns: tuple[Column, ...]) -> pa.Schema:
    fields: list[tuple[str, pa.DataType]] = []
    for column in columns:
        match column.kind:
            case Kind.IMAGE:
                fields.append((_file_column(column), pa.string()))
            case Kind.IMAGES:
                fields.append((_file_column(column), pa.list_(pa.string())))
            case Kind.PARTS:
                fields.append((_file_column(column), pa.list_(pa.string())))
                fields.append((column.name, pa.list_(_PART)))
            case Kind.VALUE:
                fields.append((column.name, column.type))
    return pa.schema(fields)


def _file_column(column: Column) -> str:
    """Returns the name of a column of file names, as `datasets` knows it."""
    if column.kind is Kind.PARTS:
        return "images_file_names"
    if column.kind is Kind.IMAGES:
        return f"{column.name}_file_names"
    return "file_name" if column.name == _IMAGE else f"{column.name}_file_name"


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
    return buffer.getvalue()
