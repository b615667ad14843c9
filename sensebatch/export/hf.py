"""Parquet files as `datasets` writes them: images inside, loaded by `load_dataset` without code.

Source: `datasets` 5.2, io/parquet.py and arrow_writer.py: content-defined chunking with its
options, a page index, encoded images uncompressed and plain, everything else in a dictionary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sensebatch.export.columns import Column, Kind, columns_of, feature
from sensebatch.export.images import LoadedSample
from sensebatch.export.ledger import Shard
from sensebatch.export.shards import Limits
from sensebatch.export.target import Target
from sensebatch.tasks import Task

ROW_GROUP_BYTES = 100 * 10**6
ROW_GROUP_ROWS = 10_000
"""At most, where images are small or missing."""
CHUNKING = {"min_chunk_size": 256 * 1024, "max_chunk_size": 1024 * 1024, "norm_level": 0}
"""Where pages end depends on the values, so that what did not change is stored once by the Hub."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", IMAGE)])
_TYPES = {Kind.IMAGE: IMAGE, Kind.IMAGES: pa.list_(IMAGE), Kind.PARTS: pa.list_(PART)}
_IMAGE_FEATURE = {"_type": "Image"}
_FEATURES: Mapping[Kind, Any] = {
    Kind.IMAGE: _IMAGE_FEATURE,
    Kind.IMAGES: {"feature": _IMAGE_FEATURE, "_type": "List"},
    Kind.PARTS: {
        "feature": {
            "type": feature(pa.string()),
            "text": feature(pa.string()),
            "image": _IMAGE_FEATURE,
        },
        "_type": "List",
    },
}


def limits(shard_bytes: int) -> Limits:
    """Returns how much goes into a shard."""
    return Limits(num_bytes=shard_bytes)


def pattern(task: str, split: str) -> str:
    """Returns which files of an export are those of a task and split."""
    return f"{task}/{split}-*.parquet"


def is_own(name: str, task: str) -> bool:
    """Returns whether an export of this format may have made a file of this name."""
    return re.fullmatch(rf"{task}/\.?[\w.]+-\d{{5,}}\.parquet(\.tmp)?", name) is not None


def write(target: Target, shard: Shard, samples: Iterator[LoadedSample]) -> dict[str, int]:
    """Writes a shard and returns the bytes of its files by name."""
    columns = columns_of(Task(shard.task))
    name = f"{shard.stem}.parquet"
    with target.write(name) as file:
        with pq.ParquetWriter(
            file,
            schema_of(columns),
            use_content_defined_chunking=CHUNKING,
            write_page_index=True,
            **_options(columns),
        ) as writer:
            for table in _row_groups(columns, samples):
                writer.write_table(table, row_group_size=table.num_rows)
            writer.add_key_value_metadata({"content_defined_chunking": json.dumps(CHUNKING)})
        num_bytes = file.tell()
    return {name: num_bytes}


def schema_of(columns: tuple[Column, ...]) -> pa.Schema:
    """Returns the Arrow schema of rows, with the features that `datasets` reads."""
    features = {
        column.name: feature(column.type) if column.type else _FEATURES[column.kind]
        for column in columns
    }
    fields = [(column.name, column.type or _TYPES[column.kind]) for column in columns]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _row_groups(columns: tuple[Column, ...], samples: Iterator[LoadedSample]) -> Iterator[pa.Table]:
    """Yields rows in tables of about the bytes of a row group."""
    schema = schema_of(columns)
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for loaded in samples:
        rows.append({column.name: _cell(column, loaded) for column in columns})
        num_bytes += sum(map(len, loaded.images))
        if num_bytes >= ROW_GROUP_BYTES or len(rows) == ROW_GROUP_ROWS:
            yield pa.Table.from_pylist(rows, schema)
            rows, num_bytes = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema)


def _cell(column: Column, loaded: LoadedSample) -> Any:
    value = loaded.sample.values[column.name]
    match column.kind:
        case Kind.IMAGE:
            return _image(loaded, value)
        case Kind.IMAGES:
            return [_image(loaded, index) for index in value]
        case Kind.PARTS:
            return [{**part, "image": _image(loaded, part["image"])} for part in value]
    return value


def _image(loaded: LoadedSample, index: int | None) -> dict[str, Any] | None:
    if index is None:
        return None
    return {"bytes": loaded.images[index], "path": loaded.sample.images[index].name}


def _options(columns: tuple[Column, ...]) -> dict[str, Any]:
    """Returns how each leaf of each column is stored."""
    compression: dict[str, str] = {}
    dictionaries: list[str] = []
    encoding: dict[str, str] = {}
    for column in columns:
        for leaf in _leaves(column.name, column.type or _TYPES[column.kind]):
            if column.kind is Kind.VALUE:
                compression[leaf] = "snappy"
                dictionaries.append(leaf)
            else:
                compression[leaf] = "none"
                encoding[leaf] = "PLAIN"
    return {"compression": compression, "use_dictionary": dictionaries, "column_encoding": encoding}


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{path}.{field.name}", field.type)]
    if pa.types.is_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    return [path]
