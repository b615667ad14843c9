"""The schema of a Parquet file, made from the dataclass of its rows: one declaration a column.

A field's type gives the column's; a field that may be None is a column that may be null.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pyarrow as pa

_TYPES: Mapping[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def arrow_schema(row: type) -> pa.Schema:
    """Returns the columns of a file whose rows are this dataclass, in the order of its fields.

    Args:
        row: Its fields are of plain types, tuples of them, or either `| None`. A name of Arrow's in
            `Annotated` says which type where Python has one for several.
    """
    hints = get_type_hints(row, include_extras=True)
    return pa.schema([_column(name, hint) for name, hint in hints.items()])


def _column(name: str, hint: Any) -> pa.Field:
    is_optional = type(None) in get_args(hint)
    kind = next(arg for arg in get_args(hint) if arg is not type(None)) if is_optional else hint
    return pa.field(name, arrow_type(kind), nullable=is_optional)


def arrow_type(kind: Any) -> pa.DataType:
    """Returns the type of a column whose values have this type."""
    if get_origin(kind) is Annotated:
        return pa.type_for_alias(kind.__metadata__[0])
    if get_origin(kind) is tuple:
        return pa.list_(_TYPES[get_args(kind)[0]])
    return _TYPES[kind]
