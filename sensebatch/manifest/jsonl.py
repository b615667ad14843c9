"""Reads JSONL manifests, ours and the upstream ones, line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sensebatch.manifest.problems import found
from sensebatch.manifest.rows import RawRow, Report, given, is_unicode

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def jsonl_rows(path: Path, report: Report) -> Iterator[RawRow]:
    """Yields the rows of a JSONL file; blank lines are skipped, unreadable ones reported.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                row = _parsed(line)
            except json.JSONDecodeError as error:
                # The end of the line counts as a line of its own.
                column = min(error.pos, len(error.doc.rstrip("\r\n"))) + 1
                report(number, (), f"expected a JSON object, found: {error.msg}: column {column}")
                continue
            except (ValueError, RecursionError) as error:
                report(number, (), f"expected a JSON object, found: {error}")
                continue
            if not isinstance(row, dict):
                report(number, (), f"expected a JSON object, found {found(row)}")
                continue
            fields = given(row)
            if type(fields.get("id")) is int:
                fields["id"] = str(fields["id"])
            yield RawRow(fields=fields, number=number)


def _parsed(line: bytes) -> object:
    """Returns the value of a line.

    Raises:
        ValueError: It is not strict JSON, repeats a key, or is not Unicode.
    """
    value = json.loads(
        line.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
    )
    if b"\\u" in line and not is_unicode(value):
        raise ValueError("half of a surrogate pair, which is no character")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated!r} is given twice")
    return mapping


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
