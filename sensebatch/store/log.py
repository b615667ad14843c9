"""log.parquet: one row per attempt, always rebuildable from the state database.

The file is rewritten whole and replaced, so that it can be read at any moment. What does not
change any more is kept in parts of a fixed number of rows, so that a rewrite only copies them.
Knows the columns and the files; what a row says is decided in `rows`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sensebatch.errors import RunFolderError
from sensebatch.store.attempts import row_from_json
from sensebatch.store.files import atomic_file, sync_folders
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import State

PART_ROWS = 4096
"""Rows of a part."""

_MIN_INTERVAL_S = 2.0
_MAX_SHARE = 0.05
"""Share of the time that rewriting may take."""

_TIME = pa.timestamp("us", tz="UTC")

SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        pa.field("session", pa.int32(), nullable=False),
        pa.field("job_id", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("error_file", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("num_steps", pa.int32(), nullable=False),
        pa.field("cfg_scale", pa.float64(), nullable=False),
        pa.field("img_cfg_scale", pa.float64(), nullable=False),
        pa.field("cfg_norm", pa.string(), nullable=False),
        pa.field("cfg_interval", pa.list_(pa.float64()), nullable=False),
        pa.field("timestep_shift", pa.float64(), nullable=False),
        pa.field("think", pa.bool_(), nullable=False),
        pa.field("num_input_images", pa.int32(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("image_tokens", pa.int64(), nullable=False),
        pa.field("think_tokens", pa.int64(), nullable=False),
        pa.field("text_tokens", pa.int64(), nullable=False),
        pa.field("batch_id", pa.string()),
        pa.field("batch_size", pa.int32(), nullable=False),
        pa.field("shared_figures", pa.bool_(), nullable=False),
        pa.field("queue_s", pa.float64(), nullable=False),
        pa.field("load_s", pa.float64(), nullable=False),
        pa.field("wait_s", pa.float64()),
        pa.field("prefill_s", pa.float64(), nullable=False),
        pa.field("think_s", pa.float64(), nullable=False),
        pa.field("denoise_s", pa.float64(), nullable=False),
        pa.field("encode_s", pa.float64(), nullable=False),
        pa.field("total_s", pa.float64(), nullable=False),
        pa.field("num_kept_images", pa.int32()),
        pa.field("step_s", pa.float64()),
        pa.field("image_tok_per_s", pa.float64()),
        pa.field("text_tok_per_s", pa.float64()),
        pa.field("peak_allocated_bytes", pa.int64(), nullable=False),
        pa.field("peak_reserved_bytes", pa.int64(), nullable=False),
        pa.field("peak_rss_bytes", pa.int64(), nullable=False),
        pa.field("load_peak_allocated_bytes", pa.int64(), nullable=False),
        pa.field("load_peak_reserved_bytes", pa.int64(), nullable=False),
        pa.field("load_peak_rss_bytes", pa.int64(), nullable=False),
        pa.field("vram_mode", pa.string(), nullable=False),
        pa.field("budget_bytes", pa.int64()),
        pa.field("attn_backend", pa.string(), nullable=False),
        pa.field("compile_s", pa.float64()),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("precision", pa.string()),
        pa.field("device", pa.string(), nullable=False),
        pa.field("torch_version", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("checkpoint", pa.string(), nullable=False),
        pa.field("lora", pa.string()),
        pa.field("system_prompt_source", pa.string(), nullable=False),
        pa.field("image_paths", pa.list_(pa.string()), nullable=False),
        pa.field("image_sha256", pa.list_(pa.string()), nullable=False),
        pa.field("text_path", pa.string()),
        pa.field("text_sha256", pa.string()),
        pa.field("started_at", _TIME, nullable=False),
        pa.field("finished_at", _TIME, nullable=False),
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("source_row", pa.string(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
    ]
)
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
            RunFolderError: The folder cannot be written.
        """
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Writes the log with every row there is.

        Raises:
            StorageFullError: The disk is full; the log before is still there.
            RunFolderError: The folder cannot be written.
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


def metadata_text(metadata: object) -> str:
    """Returns a job's metadata as the log holds it."""
    return json.dumps(metadata, ensure_ascii=False, sort_keys=True)


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
