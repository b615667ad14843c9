"""Reads Parquet manifests in batches of rows, so memory does not grow with the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from sensebatch.bounded import UnreadableFileError, check_file
from sensebatch.manifest.fields import IMAGE_FIELDS, JOB_FIELD_NAMES
from sensebatch.manifest.inputs import READ_AHEAD_BYTES
from sensebatch.manifest.problems import Unreadable, unknown_field
from sensebatch.manifest.rows import RawRow, Report, given

ROWS_IN_MEMORY = 2048
"""How many rows are held at once."""
IMAGE_ROWS_IN_MEMORY = 32
"""How many rows are held at once if a column holds the bytes of images."""

_DAMAGED = (pa.ArrowException, UnicodeDecodeError)
"""What pyarrow raises on a file that is not Parquet, or not all of it."""
_BAD_CELL = (pa.ArrowException, ValueError, OverflowError)
"""What a cell raises that Python has no value for: text that is not UTF-8, a time out of range."""
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


def parquet_rows(path: Path, report: Report) -> Iterator[RawRow]:
    """Yields the rows of a Parquet file, counted from 0, without their nulls.

    Raises:
        OSError: The file cannot be read.
    """
    check_file(path)
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_AHEAD_BYTES)
        schema = file.schema_arrow
    except _DAMAGED as error:
        raise UnreadableFileError(f"expected a Parquet file, found an error: {error}") from error
    first = 0
    with file:
        names = _known_columns(schema, report)
        images = any(has_bytes(schema.field(name).type) for name in names)
        size = IMAGE_ROWS_IN_MEMORY if images else ROWS_IN_MEMORY
        try:
            for batch in file.iter_batches(batch_size=size, columns=names):
                yield from _batch_rows(batch, first)
                first += batch.num_rows
        except _DAMAGED as error:
            report(first, (), f"expected a Parquet file, found an error: {error}")


def _known_columns(schema: pa.Schema, report: Report) -> list[str]:
    """Returns the columns that are fields; reports each other column once, not in every row."""
    names = []
    indices = _pandas_indices(schema)
    for name in dict.fromkeys(schema.names):
        if name in indices:
            continue
        if name not in JOB_FIELD_NAMES:
            report(0, (name,), f"column: {unknown_field(name, JOB_FIELD_NAMES)}")
        elif schema.names.count(name) > 1:
            report(0, (name,), "column: expected every column once, found it again")
        else:
            names.append(name)
    return names


def _pandas_indices(schema: pa.Schema) -> set[str]:
    """Returns the columns that pandas added because a table was filtered or sorted."""
    try:
        said = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))["index_columns"]
        return {name for name in said if isinstance(name, str) and _PANDAS_INDEX.fullmatch(name)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return set()


def has_bytes(kind: pa.DataType) -> bool:
    """Returns whether an image column holds structs with bytes, or lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return has_bytes(kind.value_type)
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _batch_rows(batch: pa.RecordBatch, first: int) -> Iterator[RawRow]:
    columns = [
        (name, _values(name, column))
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    for index in range(batch.num_rows):
        fields = {
            name: values[index]
            for name, values in columns
            if values[index] is not None or name in IMAGE_FIELDS
        }
        yield RawRow(fields=given(fields), number=first + index)


def _values(name: str, column: pa.Array) -> list[Any]:
    """Returns a column's values as Python objects, in the types that JSON has."""
    if _is_plain(column.type) or name in IMAGE_FIELDS:
        try:
            return [None if _is_gap(value) else value for value in column.to_pylist()]
        except _BAD_CELL:
            # One of them cannot be read; it is reported below.
            pass
    return [_json_value(cell) for cell in column]


def _is_plain(kind: pa.DataType) -> bool:
    """Returns whether values of a type are JSON values as they are."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


def _is_gap(value: object) -> bool:
    """Returns whether a value is the NaN that tables have for a gap."""
    return isinstance(value, float) and math.isnan(value)


def _json_value(cell: pa.Scalar) -> Any:
    """Returns a cell as JSON would hold it, at any depth."""
    if not cell.is_valid:
        return None
    if isinstance(cell, pa.StructScalar):
        return {name: _json_value(part) for name, part in cell.items()}
    if isinstance(cell, pa.MapScalar):
        pairs = [(_json_value(entry["key"]), _json_value(entry["value"])) for entry in cell.values]
        return {key if isinstance(key, str) else json.dumps(key): value for key, value in pairs}
    if isinstance(cell, pa.ListScalar):
        return [_json_value(item) for item in cell.values]
    if isinstance(cell, pa.DictionaryScalar):
        return _json_value(cell.value)
    try:
        return _json_leaf(cell.as_py())
    except _BAD_CELL as error:
        return _as_text(cell, error)


def _as_text(cell: pa.Scalar, error: Exception) -> Any:
    """Returns the text of a time that does not fit Python's types."""
    if pa.types.is_temporal(cell.type):
        try:
            return cell.cast(pa.string()).as_py().replace(" ", "T", 1)
        except _BAD_CELL:
            pass
    return Unreadable(f"a cell that cannot be read ({error})")


def _json_leaf(value: Any) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID):
        return str(value)
    return None if _is_gap(value) else value
