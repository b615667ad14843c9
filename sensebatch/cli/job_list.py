"""Prints jobs of a run as a table, or writes them as JSON, CSV or Parquet."""

from __future__ import annotations

import difflib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from sensebatch.bounded import escaped
from sensebatch.cli.messages import Output, OutputError, error_text, show
from sensebatch.cli.tables import FittingTable, print_parts
from sensebatch.dataset.records import COLUMNS, Dataset, Record
from sensebatch.dataset.tables import ALL, csv_lines, json_lines, row_of, schema_of
from sensebatch.dataset.tables import tables as as_tables
from sensebatch.dataset.where import listing
from sensebatch.errors import ConfigError, StorageError
from sensebatch.store.files import atomic_file
from sensebatch.units import counted

LIST_WIDTH = 160
"""Columns of the list in a file or a pipe, where ids are searched for and copied."""


def check_columns(dataset: Dataset, names: Sequence[str] | None) -> None:
    """Refuses names that no column has, and those that are given twice.

    Raises:
        ConfigError: There is one.
    """
    for place, name in enumerate(names or ()):
        if name in (names or ())[:place]:
            raise ConfigError(f"--columns: expected each name once, found {name!r} again")
        if name not in COLUMNS and name not in dataset.extra_columns:
            known = sorted({*COLUMNS, *dataset.extra_columns})
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"--columns: expected names of columns, found {name!r}{hint}\n{listing(known)}"
            )


def write_list(
    form: str,
    records: Iterable[Record],
    dataset: Dataset,
    names: Sequence[str] | None,
    output: Path | None,
) -> int:
    """Writes records to a file or, as text, to stdout; returns how many.

    Args:
        form: `json`, `csv` or `parquet`.
        records: The records.
        dataset: What they are of.
        names: The columns; None for all but the text.
        output: The file; None for stdout.

    Raises:
        OutputError: The file or stdout cannot be written.
    """
    names = ALL if names is None else names
    extra = {name: dataset.extra_columns[name] for name in names if name not in COLUMNS}
    count = itertools.count()
    rows = (row_of(record, names, extra) for record, _ in zip(records, count, strict=False))
    if output is None:
        stdout = Output(sys.stdout)
        # What an encoding has not would be escaped as Python does it, which JSON does not know.
        is_unicode = "utf" in (stdout.encoding or "").lower()
        for line in _lines(form, rows, names, ascii_alone=not is_unicode):
            stdout.write(line)
        stdout.flush()
        return next(count)
    try:
        with atomic_file(output) as file:
            if form == "parquet":
                _write_parquet(rows, names, file)
            else:
                file.writelines(line.encode() for line in _lines(form, rows, names))
    except StorageError as error:
        # There is no run to resume.
        raise OutputError(str(error)) from error
    return next(count)


def _lines(
    form: str,
    rows: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    *,
    ascii_alone: bool = False,
) -> Iterator[str]:
    if form == "json":
        return json_lines(rows, ascii_alone=ascii_alone)
    return csv_lines(rows, names)


def _write_parquet(rows: Iterable[Mapping[str, Any]], names: Sequence[str], file: BinaryIO) -> None:
    schema = schema_of(names)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in as_tables(rows, schema):
            writer.write_table(table)


def print_table(records: Iterable[Record], names: Sequence[str] | None, most: int) -> None:
    """Prints records as a table, then how many there are of each status.

    Args:
        records: The records.
        names: The columns; None for the main ones.
        most: Rows of the table; the others are only counted.
    """
    statuses: Counter[str] = Counter()
    shown: list[Record] = []
    for record in records:
        statuses[record.status] += 1
        if len(shown) < most:
            shown.append(record)
    total = sum(statuses.values())
    if not shown:
        show("0 jobs")
        return
    if names is None:
        table = _main_table(shown)
    else:
        table = FittingTable(*names, words=names)
        for record in shown:
            table.add_row(*(_text(record, name) for name in names))
    words = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items()))
    lines = [f"{counted(total, 'job')}: {words}"]
    if total > len(shown):
        lines.insert(0, f"... and {total - len(shown):,} more; --limit {total} prints all")
    print_parts(table, *lines, file_width=LIST_WIDTH)


def _main_table(records: Sequence[Record]) -> FittingTable:
    """Returns what most people want to see of jobs."""
    titles = ["id", "task", "size", "seed", "status", "images", "about"]
    table = FittingTable(
        *titles, words=["id", "about"], optional=["seed", "images", "size", "task"]
    )
    for record in records:
        size = "" if record.job.resolution is None else str(record.job.resolution)
        images = len(record.image_files)
        cells = (record.job.task.value, size, str(record.job.seed), record.status)
        about = "\n".join(map(escaped, _about(record)))
        table.add_row(escaped(record.id), *cells, str(images or ""), about)
    return table


def _about(record: Record) -> Iterator[str]:
    """Yields what is special about a job, else its prompt."""
    row = record.row
    if not record.in_manifest:
        yield "no longer in the manifest"
    if row is not None and row["status"] == "failed":
        yield error_text(row["error_type"], row["error_message"])
        return
    if record.finish_reason not in (None, "complete", "max_images"):
        yield str(record.finish_reason)
    if record.pick is not None:
        yield record.pick.value
    yield record.job.prompt


def _text(record: Record, name: str) -> str:
    value = (
        record.value(name) if name in COLUMNS else {**record.metadata, **record.matrix}.get(name)
    )
    if value is None:
        return ""
    is_plain = isinstance(value, str | datetime)
    return escaped(str(value) if is_plain else json.dumps(value, ensure_ascii=False, default=str))
