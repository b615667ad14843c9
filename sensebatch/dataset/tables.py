"""Records as tables: the types of their columns, and rows for Parquet, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sensebatch.dataset.records import COLUMNS, SETTINGS, TAGS
from sensebatch.declarations import declared
from sensebatch.jobs import Sampling
from sensebatch.store.columns import arrow_type
from sensebatch.store.log import ROW_SCHEMA

if TYPE_CHECKING:
    from sensebatch.dataset.records import Record

_CHUNK = 1000
"""Records that are turned into text or a table at a time."""

_OWN_TYPES = {"in_manifest": pa.bool_(), "attempts": pa.int32(), TAGS: pa.list_(pa.string())}

ALL = tuple(name for name in COLUMNS if name != "text")
"""The columns where none were asked for: the text is in files of its own."""


def schema_of(names: Sequence[str]) -> pa.Schema:
    """Returns the types of columns, of which any may be null; one that is not known is text."""
    return pa.schema([pa.field(name, _type(name)) for name in names])


def _type(name: str) -> pa.DataType:
    if name in _OWN_TYPES:
        return _OWN_TYPES[name]
    if name in ROW_SCHEMA.names:
        return ROW_SCHEMA.field(name).type
    return arrow_type(declared(Sampling)[name].plain_type) if name in SETTINGS else pa.string()


def row_of(record: Record, names: Sequence[str], extra: Mapping[str, str]) -> dict[str, Any]:
    """Returns columns of a record by name, as plain data.

    Args:
        record: The record.
        names: Columns, or names inside `matrix` or `metadata`.
        extra: Which of the two such a name is in.
    """
    found = {}
    for name in names:
        if name in extra:
            found[name] = getattr(record, extra[name]).get(name)
        else:
            found[name] = record.value(name)
    return found


def json_lines(rows: Iterable[Mapping[str, Any]], *, ascii_alone: bool = False) -> Iterator[str]:
    """Yields one JSON list, with a row on a line."""
    before = "["
    for row in rows:
        yield f"{before}\n{json.dumps(row, ensure_ascii=ascii_alone, default=_time)}"
        before = ","
    yield "[]\n" if before == "[" else "\n]\n"


def csv_lines(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """Yields CSV with a row of names; lists and objects are JSON, and what is null is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row[name]) for name in names])
        if text.tell() > 2**16:
            yield text.getvalue()
            text.seek(0)
            text.truncate()
    yield text.getvalue()


def tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields rows as tables of some thousand rows."""
    rows = iter(rows)
    while chunk := list(islice(rows, _CHUNK)):
        columns = [
            pa.array([_fitting(row[field.name], field.type) for row in chunk], field.type)
            for field in schema
        ]
        yield pa.Table.from_arrays(columns, schema=schema)


def _fitting(value: Any, kind: pa.DataType) -> Any:
    if value is not None and pa.types.is_string(kind) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=_time)
    return value


def _cell(value: Any) -> Any:
    if isinstance(value, list | tuple | dict | bool):
        return json.dumps(value, ensure_ascii=False)
    return _time(value) if isinstance(value, datetime) else value


def _time(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
