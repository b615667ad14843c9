"""Reads the bytes of input images again when their job is run, and makes sure they are the same.

Knows files and Parquet manifests; decodes nothing.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sensebatch.bounded import read_file
from sensebatch.errors import JobError
from sensebatch.image_files import MAX_FILE_BYTES
from sensebatch.jobs import InputImage

ROWS_IN_MEMORY = 32
"""Rows of a Parquet manifest whose images are held at once."""
READ_AHEAD_BYTES = 2**20
"""Read at once of a column of a Parquet manifest; without a limit, all of a row group would be,
and that may be all there is."""


class InputReader:
    """Reads input images; quickly where those of a Parquet manifest are asked for in order.

    It keeps one Parquet file open, with a few rows of one column. It may be used from several
    threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._column: _ParquetColumn | None = None

    def read(self, image: InputImage) -> bytes:
        """Returns the encoded bytes of an input image.

        Raises:
            JobError: They are missing, unreadable, or not those that the job was planned with.
        """
        try:
            content = self._content(image)
        except OSError as error:
            raise JobError(f"expected the input image {_place(image)}, found: {error}") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != image.sha256:
            raise JobError(
                f"expected the input image {_place(image)} as it was when the manifest was read "
                f"(sha256 {image.sha256}), found other bytes (sha256 {digest})"
            )
        return content

    def close(self) -> None:
        """Closes the open Parquet file, if there is one."""
        with self._lock:
            self._close_column()

    def _content(self, image: InputImage) -> bytes:
        if image.member is None:
            return read_file(Path(image.path), MAX_FILE_BYTES)
        row, name, index = image.member
        with self._lock:
            cell = self._open_column(image.path, name).cell(row)
        images = cell if isinstance(cell, list) else [cell]
        found = images[index] if index < len(images) else None
        content = found.get("bytes") if isinstance(found, dict) else None
        if content is None:
            raise JobError(f"expected the input image {_place(image)}, found no bytes there")
        return bytes(content)

    def _open_column(self, path: str, name: str) -> _ParquetColumn:
        """Returns the column, opening it in place of another one."""
        if self._column is None or (self._column.path, self._column.name) != (path, name):
            self._close_column()
            self._column = _ParquetColumn(path, name)
        return self._column

    def _close_column(self) -> None:
        if self._column is not None:
            self._column.close()
            self._column = None


def _place(image: InputImage) -> str:
    """Returns where an image is, for people."""
    if image.member is None:
        return image.path
    row, name, index = image.member
    return f"{image.path}: row {row}: {name}[{index}]"


def read_input_image(image: InputImage) -> bytes:
    """Returns the encoded bytes of one input image; for many, use one `InputReader`.

    Raises:
        JobError: They are missing, unreadable, or not those that the job was planned with.
    """
    reader = InputReader()
    try:
        return reader.read(image)
    finally:
        reader.close()


class _ParquetColumn:
    """One column of a Parquet file, read forwards a few rows at a time.

    Raises:
        OSError: The file or its column is missing, or it is not a Parquet file.
    """

    def __init__(self, path: str, name: str) -> None:
        # pyarrow is slow to import, and most runs have no images in Parquet.
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.name = path, name
        self._damage = pa.ArrowException
        try:
            self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_AHEAD_BYTES)
        except pa.ArrowException as error:
            raise OSError(f"{path} is not a Parquet file: {error}") from error
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._group_ends = list(itertools.accumulate(sizes))
        self._group = -1
        self._first = 0
        self._cells: Any = ()
        self._batches: Iterator[Any] = iter(())

    def cell(self, row: int) -> Any:
        """Returns one value.

        Raises:
            OSError: There is no such row or column, or it is damaged.
        """
        group = bisect.bisect_right(self._group_ends, row)
        if group == len(self._group_ends) or self.name not in self._file.schema_arrow.names:
            raise OSError(f"{self.path} no longer has a row {row} with a column {self.name!r}")
        try:
            if group != self._group or row < self._first:
                self._seek(group)
            while row >= self._first + len(self._cells):
                self._first += len(self._cells)
                self._cells = next(self._batches).column(0)
            return self._cells[row - self._first].as_py()
        except self._damage as error:
            raise OSError(f"{self.path} is damaged: {error}") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _seek(self, group: int) -> None:
        """Goes to the first row of a row group."""
        self._group = group
        self._first = self._group_ends[group - 1] if group else 0
        self._cells = ()
        self._batches = self._file.iter_batches(
            batch_size=ROWS_IN_MEMORY, row_groups=[group], columns=[self.name]
        )
