"""Writes the jobs of a manifest, expanded, in another format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin

from sensebatch.bounded import in_the_way
from sensebatch.config import RunConfig
from sensebatch.errors import ConfigError, StorageError
from sensebatch.image_files import file_suffix
from sensebatch.jobs import InputImage, history_fields
from sensebatch.manifest.fields import EXPANSION_FIELDS, IMAGE_FIELDS, SETTINGS
from sensebatch.manifest.inputs import InputReader
from sensebatch.manifest.read import (
    JSONL_SUFFIXES,
    PARQUET_SUFFIXES,
    SUFFIXES,
    ReadJob,
    manifest_name,
    read_jobs,
)
from sensebatch.tasks import Task
from sensebatch.yaml_values import dump_yaml

ROWS_IN_MEMORY = 1024
"""How many rows a Parquet writer collects."""
IMAGE_ROWS_IN_MEMORY = 32
"""How many it collects if they hold the bytes of images."""

Row = dict[str, Any]
"""A job as a manifest states it: plain values by the names of its fields."""

_REPLACED = (
    EXPANSION_FIELDS | IMAGE_FIELDS | {"type", "think_mode", "conversations", "question", "history"}
)


def convert_manifest(
    src: Path,
    dst: Path,
    config: RunConfig,
    *,
    task: Task | None = None,
    embed_images: bool = False,
    overwrite: bool = False,
) -> int:
    """Writes the jobs of a manifest to another one and returns how many rows there are.

    The tries at a prompt are one row, and every other job is one. Each gets its id and task. Seeds,
    repetitions, matrices and the manifest's defaults are expanded; the model's defaults are not
    written. Paths of images become relative to the new manifest. Images stored inside `src` go to
    the folder `<dst's stem>-images` unless they are embedded again.

    Args:
        src: A YAML, JSONL or Parquet manifest.
        dst: The file to write; an older one is there until the new one is complete.
        config: The settings that jobs are checked with.
        task: The task of rows that name none.
        embed_images: Whether images are stored inside `dst`, which must then be Parquet.
        overwrite: Whether `dst` may be a file that exists.

    Raises:
        ManifestError: Something is wrong in `src`.
        ConfigError: `dst` has no name for this, or is `src`, or exists and is to stay.
        StorageError: `dst` cannot be written.
        JobError: An image changed while it was being copied.
    """
    suffix = dst.suffix.lower()
    _check_destination(src, dst, suffix, embed_images=embed_images, overwrite=overwrite)
    temporary = dst.with_name(f".{dst.name}.tmp")
    reader = InputReader()
    count = 0

    def rows() -> Iterator[Row]:
        nonlocal count
        for reads in _by_row(read_jobs([src], config, task=task)):
            count += 1
            yield _row(reads, dst, reader, embed_images)

    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if suffix in PARQUET_SUFFIXES:
                _write_parquet(rows(), file, embed_images)
            else:
                _write_text(
                    rows(), file, None if suffix in JSONL_SUFFIXES else manifest_name([src])
                )
        temporary.replace(dst)
    except OSError as error:
        why = in_the_way(dst.parent) or error.strerror or str(error)
        raise StorageError(f"{dst}: cannot be written: {why}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reader.close()
    return count


def _check_destination(
    src: Path, dst: Path, suffix: str, *, embed_images: bool, overwrite: bool
) -> None:
    message = ""
    if suffix not in SUFFIXES:
        message = f"expected a name that ends in one of {', '.join(SUFFIXES)}, found {dst.name!r}"
    elif embed_images and suffix not in PARQUET_SUFFIXES:
        message = f"expected a Parquet manifest to store images in, found {dst.name!r}"
    elif src.exists() and dst.exists() and dst.samefile(src):
        message = "expected another file than the one that is read, found the same"
    elif dst.is_file() and not overwrite:
        message = "expected no file, found one; --overwrite replaces it"
    if message:
        raise ConfigError(f"{dst}: {message}")


def _by_row(reads: Iterable[ReadJob]) -> Iterator[list[ReadJob]]:
    """Yields the jobs that become a row: one, or all tries of a series; no questions about them."""
    series: dict[str, list[ReadJob]] = {}
    for read in reads:
        if read.job.verdict is not None:
            continue
        if read.accept is None or read.job.attempt_at is None:
            yield [read]
            continue
        tries = series.setdefault(read.job.attempt_at.series, [])
        tries.append(read)
        if len(tries) == read.accept.tries:
            yield series.pop(read.job.attempt_at.series)
    assert not series


def _row(reads: list[ReadJob], dst: Path, reader: InputReader, embed_images: bool) -> Row:
    """Returns a job as a row: what was given, under our names, without the model's defaults."""
    read, job = reads[0], reads[0].job
    given = read.fields.model_dump(exclude_none=True, exclude=set(_REPLACED))
    row: Row = {"id": job.id, "task": str(job.task), "prompt": job.prompt}
    if job.history:
        row["history"] = history_fields(job)
    if job.images:
        row["images"] = [_image(image, dst, reader, embed_images) for image in job.images]
    row |= {name: value for name, value in given.items() if name not in row}
    if job.system_prompt is not None:
        row["system_prompt"] = job.system_prompt
    if read.fields.think_mode is not None:
        row["think"] = job.think
    if "type" in job.metadata:
        row["metadata"] = {n: value for n, value in job.metadata.items() if n != "tags"}
    if read.accept is not None:
        fields = read.accept.as_fields([one.job for one in reads])
        names = fields.pop("images", ())
        for place, name in enumerate(names):
            if name is not None:
                row["images"][place] = {"bytes": None, "path": name} if embed_images else name
        row |= fields
    return row


def _image(image: InputImage, dst: Path, reader: InputReader, embed_images: bool) -> Any:
    """Returns an image as the new manifest names it; copies its bytes if necessary."""
    if image.output is not None:
        return {"bytes": None, "path": image.path} if embed_images else image.path
    if embed_images:
        name = Path(image.path).name if image.member is None else None
        return {"bytes": reader.read(image), "path": name}
    if image.member is None:
        return _path_from(Path(image.path), dst.parent)
    folder = dst.with_name(f"{dst.stem}-images")
    folder.mkdir(exist_ok=True)
    content = reader.read(image)
    copy = folder / f"{image.sha256}{file_suffix(content)}"
    if not copy.exists():
        temporary = copy.with_name(f".{copy.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(copy)
    return f"{folder.name}/{copy.name}"


def _path_from(path: Path, folder: Path) -> str:
    """Returns a path from a folder to the same file, also through links."""
    if not path.is_absolute():
        try:
            relative = os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
            if (folder / relative).samefile(path):
                return Path(relative).as_posix()
        except (OSError, ValueError):
            # It is on another drive, or was moved.
            pass
    return str(path.absolute())


def _write_text(rows: Iterable[Row], file: BinaryIO, name: str | None) -> None:
    """Writes YAML under a name, or JSONL without one."""
    if name is not None:
        file.write(dump_yaml({"version": 1, "name": name}).encode())
        file.write(b"jobs:\n")
    for row in rows:
        file.write(_json(row) if name is None else dump_yaml([row]).encode())


def _json(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _write_parquet(rows: Iterator[Row], file: BinaryIO, embed_images: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _parquet_schema(embed_images)
    size = IMAGE_ROWS_IN_MEMORY if embed_images else ROWS_IN_MEMORY
    with pq.ParquetWriter(file, schema) as writer:
        while some := [_parquet_row(row) for row in islice(rows, size)]:
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def _parquet_row(row: Row) -> Row:
    """Returns a row in the types of the columns, which are the same for all rows."""
    row = dict(row)
    if "input_max_pixels" in row:
        row["input_max_pixels"] = str(row["input_max_pixels"])
    if "metadata" in row:
        row["metadata"] = json.dumps(row["metadata"], ensure_ascii=False)
    return row


def _check_type() -> Any:
    import pyarrow as pa

    text = pa.string()
    names = {"ask": text, "choices": pa.list_(text), "is": text, "at_least": pa.float64()}
    return pa.struct(list(names.items()))


def _parquet_schema(embed_images: bool) -> Any:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    types = {int: whole, float: real, bool: pa.bool_()}
    image = pa.struct([("bytes", pa.binary()), ("path", text)]) if embed_images else text

    def column(kind: Any) -> Any:
        if get_origin(kind) is tuple:
            return pa.list_(column(get_args(kind)[0]))
        return types.get(kind, text)

    return pa.schema(
        [
            *((name, text) for name in ("id", "task", "prompt")),
            ("history", pa.list_(pa.struct([("question", text), ("answer", text)]))),
            ("images", pa.list_(image)),
            ("resolution", text),
            ("width", whole),
            ("height", whole),
            ("system_prompt", text),
            *((name, column(setting.plain_type)) for name, setting in SETTINGS.items()),
            ("accept", pa.list_(_check_type())),
            ("keep", whole),
            ("tries", whole),
            ("tags", pa.list_(text)),
            ("metadata", text),
        ]
    )
