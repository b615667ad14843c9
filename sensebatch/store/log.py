"""log.parquet: one row per attempt, which can always be written again from the state database.

The file is rewritten as a whole and replaced, so that it can be read at any moment. Rows that no
longer change are kept in parts of a fixed number, so that a rewrite only copies them and marks
which of them are current. The state has the SHA-256 of every file: one that is damaged, swapped or
of another folder is written again, and the state forgets that of log.parquet when marks change.
Knows the columns and the files; what a row says is decided in `rows`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sensebatch.errors import RunFolderError
from sensebatch.store.attempts import Attempt, Marks, row_from_json
from sensebatch.store.columns import arrow_schema
from sensebatch.store.files import atomic_file, sha256_of, sync_folders
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import State

PART_ROWS = 4096
"""Rows of a part."""

_MIN_INTERVAL_S = 2.0
_MAX_SHARE = 0.05
"""Share of the time that rewriting may take."""

_RUN, _ROWS = "sensebatch.run", "sensebatch.rows"
"""Names in a file's metadata: the folder's id, and which rows it has, counted from 1."""

ROW_SCHEMA = arrow_schema(Attempt)
"""The columns of the parts: what an attempt was, which never changes."""
SCHEMA = pa.schema([*ROW_SCHEMA, *arrow_schema(Marks)])
"""The columns of log.parquet, described one by one in docs/log.md."""


class Log:
    """Keeps log.parquet up to date with the state.

    Args:
        run_dir: The run's folder.
        state: Its database.
    """

    def __init__(self, run_dir: RunDir, state: State) -> None:
        self._run_dir = run_dir
        self._state = state
        self._run_id = state.run_id
        self._due = 0.0

    def update(self) -> None:
        """Writes the log if it was not just written; cheap to call after every commit.

        Raises:
            StorageFullError: The disk is full; the log before is still there.
            StorageError: The folder cannot be written.
        """
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Writes the log with every row there is.

        Raises:
            StorageFullError: The disk is full; the log before is still there.
            StorageError: The folder cannot be written.
        """
        start = time.monotonic()
        last = self._state.num_attempts()
        self._write(self._run_dir.log, self._marked(last), 1, last)
        end = time.monotonic()
        self._due = end + max(_MIN_INTERVAL_S, (end - start) / _MAX_SHARE)

    def is_current(self) -> bool:
        """Returns whether log.parquet is there, whole, and has every row."""
        return self._is_as_written(self._run_dir.log, 1, self._state.num_attempts())

    def is_ahead(self) -> bool:
        """Returns whether log.parquet has rows of this folder that the state does not know."""
        found = stated_rows(self._run_dir.log)
        if found is None or found.run != self._run_id:
            return False
        return found.num_rows > self._state.num_attempts()

    def _marked(self, last: int) -> Iterator[pa.Table]:
        """Yields all rows, part by part, with their marks."""
        marks = self._state.marks()
        first = 0
        for table in self._tables(last):
            own = marks[first : first + table.num_rows]
            first += table.num_rows
            columns = [list(column) for column in zip(*own, strict=True)] or [[], []]
            for field, values in zip(arrow_schema(Marks), columns, strict=True):
                table = table.append_column(field, pa.array(values, field.type))
            yield table

    def _tables(self, last: int) -> Iterator[pa.Table]:
        """Yields all rows, part by part, and writes the parts that are not there yet."""
        complete = last // PART_ROWS
        for number in range(complete):
            yield self._part(number * PART_ROWS + 1, (number + 1) * PART_ROWS)
        yield self._rows(complete * PART_ROWS + 1, last)

    def _part(self, first: int, last: int) -> pa.Table:
        """Returns the rows of a part from its file, which is written if it cannot be used."""
        path = self._run_dir.log_parts / f"part-{first // PART_ROWS:05d}.parquet"
        if self._is_as_written(path, first, last):
            return pq.read_table(path)
        rows = self._rows(first, last)
        self._write(path, iter([rows]), first, last)
        return rows

    def _rows(self, first: int, last: int) -> pa.Table:
        rows = [row_from_json(text) for text in self._state.attempt_rows(first, last)]
        return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)

    def _schema(self, path: Path, first: int, last: int) -> pa.Schema:
        """Returns the columns of a file, and whose rows it has and which."""
        schema = SCHEMA if path == self._run_dir.log else ROW_SCHEMA
        return schema.with_metadata({_RUN: self._run_id, _ROWS: f"{first}-{last}"})

    def _is_as_written(self, path: Path, first: int, last: int) -> bool:
        """Whether a file is the one that was written with these rows, in today's columns."""
        # Page checksums leave out headers and the footer, so that they alone are not enough.
        expected_digest = self._state.log_digest(self._name(path))
        if expected_digest is None or sha256_of(path) != expected_digest:
            return False
        # Not equal with metadata checked: a list's items have another name once they were written.
        found, expected = pq.read_schema(path), self._schema(path, first, last)
        return found.equals(expected) and found.metadata == expected.metadata

    def _write(self, path: Path, tables: Iterator[pa.Table], first: int, last: int) -> None:
        schema = self._schema(path, first, last)
        with (
            atomic_file(path) as file,
            pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
        ):
            for table in tables:
                writer.write_table(table)
        sync_folders([path], self._run_dir.root)
        self._state.set_log_digest(self._name(path), sha256_of(path) or "")

    def _name(self, path: Path) -> str:
        return path.relative_to(self._run_dir.root).as_posix()


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedRows:
    """Which rows a file of the log says it has."""

    run: str
    """Id of the folder that they belong to."""
    first: int | None
    """The number of the first in the log, from 1; None in files of versions that did not say."""
    num_rows: int


def stated_rows(path: Path) -> StatedRows | None:
    """Returns what a file of the log says of itself, or None where it cannot; reads no row."""
    try:
        metadata = pq.read_metadata(path)
        said = metadata.metadata or {}
        rows = said.get(_ROWS.encode())
        return StatedRows(
            run=said[_RUN.encode()].decode(),
            first=None if rows is None else int(rows.partition(b"-")[0]),
            num_rows=metadata.num_rows,
        )
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def read_log(path: Path, columns: Collection[str] = SCHEMA.names) -> pa.Table:
    """Returns the rows of a log.parquet; works while a run writes it.

    Columns that an earlier version did not write are null.

    Args:
        path: The file.
        columns: Which are read.

    Raises:
        RunFolderError: There is no log, or it cannot be read.
    """
    try:
        there = set(pq.read_schema(path).names)
        later = [field for field in SCHEMA if field.nullable and field.name not in there]
        missing = {field.name for field in later}
        log = pq.read_table(
            path,
            columns=[name for name in columns if name not in missing],
            page_checksum_verification=True,
        )
    except FileNotFoundError:
        raise RunFolderError(f"{path}: expected the log of a run, found no file") from None
    except NotADirectoryError:
        raise RunFolderError(f"{path.parent}: expected a run's folder, found a file") from None
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(
            f"{path}: expected the log of a run: {str(error).rstrip('.')}; the next sensebatch run "
            "in this folder writes it again from the state"
        ) from error
    for field in later:
        if field.name in columns:
            log = log.append_column(field, pa.nulls(log.num_rows, field.type))
    return log
