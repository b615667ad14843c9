"""Reads Parquet manifests in batches of rows; memory does not grow with the file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sensebatch.manifest.fields import IMAGE_FIELDS, JOB_FIELD_NAMES
from sensebatch.manifest.inputs import READ_AHEAD_BYTES
from sensebatch.manifest.problems import unknown_field
from sensebatch.manifest.rows import RawRow, Report, is_unicode

ROWS_IN_MEMORY = 2048
"""Rows held at once."""
PICTURE_ROWS_IN_MEMORY = 32
"""Rows held at once where a column holds the bytes of pictures."""

_WHOLE_NUMBERS = frozenset(
    [
        "width",
        "height",
        "seed",
        "n",
        "num_steps",
        "target_pixels",
        "input_max_pixels",
        "max_think_tokens",
        "max_images",
        "max_new_tokens",
    ]
)
_NUMBERS = _WHOLE_NUMBERS.union(["cfg_scale", "img_cfg_scale", "cfg_interval", "timestep_shift"])


def parquet_rows(path: Path, report: Report) -> Iterator[RawRow]:
    """Yields the rows of a Parquet file, counted from 0; null means absent.

    Raises:
        OSError: The file cannot be read.
    """
    first = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_AHEAD_BYTES) as file:
            names = _known_columns(file.schema_arrow, report)
            pictures = any(has_bytes(file.schema_arrow.field(name).type) for name in names)
            size = PICTURE_ROWS_IN_MEMORY if pictures else ROWS_IN_MEMORY
            for batch in file.iter_batches(batch_size=size, columns=names):
                yield from _batch_rows(batch, first)
                first += batch.num_rows
    except (pa.ArrowException, UnicodeDecodeError) as error:
        report(first, (), f"expected a Parquet file, found an error: {error}")


def _known_columns(schema: pa.Schema, report: Report) -> list[str]:
    """Returns the columns that are fields; the others are reported once, not in every row."""
    names = []
    for name in dict.fromkeys(schema.names):
        if name not in JOB_FIELD_NAMES:
            report(0, (name,), f"column: {unknown_field(name, JOB_FIELD_NAMES)}")
        elif schema.names.count(name) > 1:
            report(0, (name,), "column: expected every column once, found it again")
        else:
            names.append(name)
    return names


def has_bytes(kind: pa.DataType) -> bool:
    """Whether an image column's type is, or lists, a struct that holds bytes."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return has_bytes(kind.value_type)
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _batch_rows(batch: pa.RecordBatch, first: int) -> Iterator[RawRow]:
    columns = [
        (name, _values(name, column))
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    for index in range(batch.num_rows):
        fields = {name: values[index] for name, values in columns if values[index] is not None}
        yield RawRow(fields=fields, number=first + index)


def _values(name: str, column: pa.Array) -> list[Any]:
    """Returns a column's values as Python ones, in the types of the other two formats."""
    kind = column.type
    if name == "id" and pa.types.is_integer(kind):
        return column.cast(pa.string()).to_pylist()
    values = column.to_pylist()
    if name in _NUMBERS and not pa.types.is_integer(kind):
        return [_number(value, whole=name in _WHOLE_NUMBERS) for value in values]
    if name in ("metadata", "matrix"):
        return [_mapping(value) for value in values]
    if name in IMAGE_FIELDS and pa.types.is_struct(kind):
        return [_image(value) for value in values]
    return values


def _number(value: Any, *, whole: bool) -> Any:
    """Returns a number of a column as the other two formats would give it.

    Databases write decimals. Tables with gaps hold whole numbers as floating-point ones, and NaN
    where there is a gap.
    """
    if isinstance(value, list):
        return [_number(item, whole=whole) for item in value]
    if isinstance(value, Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    if whole and isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return value


def _mapping(value: Any) -> Any:
    """Returns a mapping from a struct, an Arrow map or JSON text; anything else as it is."""
    if isinstance(value, str):
        try:
            loaded = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return loaded if is_unicode(loaded) else value
    if isinstance(value, list) and all(isinstance(item, tuple) for item in value):
        return dict(value)
    return value


def _image(value: Any) -> Any:
    """Returns an image struct, or None where all of its parts are."""
    if value is not None and all(part is None for part in value.values()):
        return None
    return value
