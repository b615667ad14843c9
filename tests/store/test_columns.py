from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import pyarrow as pa
import pytest

from sensebatch.store.columns import arrow_schema


@dataclass
class Row:
    name: str
    count: Annotated[int, "int32"]
    size: int
    share: float | None
    small: Annotated[int, "int16"] | None = None
    names: tuple[str, ...] = ()
    interval: tuple[float, float] = (0.0, 1.0)
    at: datetime | None = None


def test_fields_give_types_and_nullability_in_their_order() -> None:
    assert arrow_schema(Row).equals(
        pa.schema(
            [
                pa.field("name", pa.string(), nullable=False),
                pa.field("count", pa.int32(), nullable=False),
                pa.field("size", pa.int64(), nullable=False),
                pa.field("share", pa.float64()),
                pa.field("small", pa.int16()),
                pa.field("names", pa.list_(pa.string()), nullable=False),
                pa.field("interval", pa.list_(pa.float64()), nullable=False),
                pa.field("at", pa.timestamp("us", tz="UTC")),
            ]
        )
    )


def test_field_that_no_column_can_hold_is_our_mistake() -> None:
    @dataclass
    class Bad:
        anything: object

    with pytest.raises(KeyError):
        arrow_schema(Bad)
