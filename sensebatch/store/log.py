"""log.parquet: one row per attempt, always rebuildable from the state database.

The file is rewritten whole and replaced, so that it can be read at any moment. What does not
change any more is kept in parts of a fixed number of rows, so that a rewrite only copies them.
Knows the columns and the files; what a row says is decided in `rows`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sensebatch.errors import RunFolderError
from sensebatch.store.attempts import Attempt, row_from_json
from sensebatch.store.columns import arrow_schema
from sensebatch.store.files import atomic_file, sync_folders
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import State

PART_ROWS = 4096
"""Rows of a part."""

_MIN_INTERVAL_S = 2.0
_MAX_SHARE = 0.05
"""Share of the time that rewriting may take."""

SCHEMA = arrow_schema(Attempt)
"""The columns, described one by one in docs/log.md."""


class Log:
    """Keeps log.parquet up to date with the state.

    Args:
        run_dir: The run's folder.
        state: Its database.
    """

    def __init__(self, run_dir: RunDir, state: State) -> None:
        self._run_dir = run_dir
        self._state = state
        self._schema = SCHEMA.with_metadata({"sensebatch.run": state.run_id})
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
        self._write(self._run_dir.log, self._tables(last))
        end = time.monotonic()
        self._due = end + max(_MIN_INTERVAL_S, (end - start) / _MAX_SHARE)

    def is_current(self) -> bool:
        """Returns whether log.parquet is there, whole, and has every row."""
        try:
            with pq.ParquetFile(self._run_dir.log) as file:
                # Read to the end: what is damaged inside has an end that can be read.
                rows = sum(batch.num_rows for batch in file.iter_batches(PART_ROWS))
                return self._is_own(file) and rows == self._state.num_attempts()
        except (OSError, pa.ArrowException):
            return False

    def _tables(self, last: int) -> Iterator[pa.Table]:
        """Yields all rows, part by part, and writes the parts that are not there yet."""
        complete = last // PART_ROWS
        for number in range(complete):
            path = self._part(number)
            rows = self._read_part(path)
            if rows is None:
                rows = self._rows(number * PART_ROWS + 1, (number + 1) * PART_ROWS)
                self._write(path, iter([rows]))
            yield rows
        yield self._rows(complete * PART_ROWS + 1, last)

    def _rows(self, first: int, last: int) -> pa.Table:
        rows = [row_from_json(text) for text in self._state.attempt_rows(first, last)]
        return pa.Table.from_pylist(rows, schema=self._schema)

    def _part(self, number: int) -> Path:
        return self._run_dir.log_parts / f"part-{number:05d}.parquet"

    def _read_part(self, path: Path) -> pa.Table | None:
        """Returns the rows of a part, or None where it is missing, damaged or another state's."""
        try:
            with pq.ParquetFile(path) as file:
                is_part = self._is_own(file) and file.metadata.num_rows == PART_ROWS
                return file.read() if is_part else None
        except (OSError, pa.ArrowException):
            return None

    def _is_own(self, file: pq.ParquetFile) -> bool:
        """Whether a file has these columns and belongs to this state, not to one before it."""
        # Not equal with metadata checked: a list's items have another name once they were written.
        found = file.schema_arrow
        return found.equals(self._schema) and found.metadata == self._schema.metadata

    def _write(self, path: Path, tables: Iterator[pa.Table]) -> None:
        with (
            atomic_file(path) as file,
            pq.ParquetWriter(file, self._schema, compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table)
        sync_folders([path], self._run_dir.root)


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
        log = pq.read_table(path, columns=[name for name in columns if name not in missing])
    except FileNotFoundError:
        raise RunFolderError(f"{path}: expected the log of a run, found no file") from None
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(
            f"{path}: expected the log of a run: {error}; running the same command again writes "
            "it anew"
        ) from error
    for field in later:
        if field.name in columns:
            log = log.append_column(field, pa.nulls(log.num_rows, field.type))
    return log
