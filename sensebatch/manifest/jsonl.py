"""Reads JSONL manifests, ours and the upstream ones, line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sensebatch.bounded import MAX_TEXT_BYTES, check_file, load_json
from sensebatch.manifest.problems import found
from sensebatch.manifest.rows import RawRow, Report, given


def jsonl_rows(path: Path, report: Report) -> Iterator[RawRow]:
    """Yields the rows of a JSONL file. Blank lines are skipped, and unreadable ones reported.

    Raises:
        OSError: The file cannot be read.
    """
    check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            if len(line) > MAX_TEXT_BYTES:
                report(number, (), f"expected a line of at most {MAX_TEXT_BYTES:,} bytes")
                return
            try:
                row = load_json(line)
            except json.JSONDecodeError as error:
                # An error at the end of the line has a position on the next one.
                column = min(error.pos, len(error.doc.rstrip("\r\n"))) + 1
                report(number, (), f"expected a JSON object, found: {error.msg}: column {column}")
                continue
            except ValueError as error:
                report(number, (), f"expected a JSON object, found: {error}")
                continue
            if not isinstance(row, dict):
                report(number, (), f"expected a JSON object, found {found(row)}")
                continue
            yield RawRow(fields=given(row), number=number)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields lines; the beginning and then the rest of one that is too long."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        yield line
