"""Reads rows that a Python program holds in memory, by the rules of a JSONL manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from sensebatch.bounded import is_unicode
from sensebatch.manifest.problems import found
from sensebatch.manifest.rows import RawRow, Report, given


def memory_rows(rows: Iterable[object], report: Report) -> Iterator[RawRow]:
    """Yields rows, counted from 0, and reports those that are not mappings of Unicode text."""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            report(number, (), f"expected a mapping of names and values, found {found(row)}")
            continue
        fields = given(plain(row))
        if not is_unicode(fields):
            report(number, (), "expected Unicode text, found half of a surrogate pair")
            continue
        yield RawRow(fields=fields, number=number)


def plain(value: Any) -> Any:
    """Returns a value in the types that JSON has: paths as text, sequences as lists.

    Bytes and unknown types stay as they are; the checks report them.
    """
    if isinstance(value, Mapping):
        return {str(plain(name)): plain(item) for name, item in value.items()}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        # A NumPy scalar or array.
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [plain(item) for item in value]
    return value
