"""The SQLite file under the state: how it is opened, and what its errors mean to a user."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sensebatch.errors import RunFolderError, StorageError, StorageFullError
from sensebatch.store import migrations
from sensebatch.store.file_systems import network_file_system
from sensebatch.store.files import reason, repair_command
from sensebatch.store.state_dir import run_folder_of

_BUSY_TIMEOUT_S = 30.0

_COPIES = 5
"""Copies that are tried of a file that is written meanwhile."""

_STORAGE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)


class Database:
    """One connection, shared by threads, one transaction at a time.

    Args:
        path: The file.
        read_only: Reads an existing file, also beside the process that writes it. Nothing is left
            beside the file afterwards, and nobody has to be allowed to write there.
        as_copy: Works on a copy of an existing file, or on an empty one; nothing is written back.

    Raises:
        RunFolderError: The file is not a state database, or a newer version made it.
        StorageFullError: The disk is full.
        StorageError: The file cannot be read or written.
    """

    def __init__(self, path: Path, *, read_only: bool = False, as_copy: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        with self.errors():
            if as_copy:
                self._connection = self._opened_as_copy()
            else:
                self._connection = self._opened_to_read() if read_only else self._opened_to_write()

    def _opened_to_write(self) -> sqlite3.Connection:
        """Returns a connection to a file with today's tables."""
        connection = _connect(self.path)
        try:
            is_on_network = network_file_system(self.path) is not None
            if is_on_network:
                # The log that an earlier version has left there is read without shared memory.
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            # Refuse a file of others before it is changed.
            migrations.missing_steps(self.path, connection)
            connection.execute(f"PRAGMA journal_mode = {'DELETE' if is_on_network else 'WAL'}")
            connection.execute(f"PRAGMA synchronous = {'EXTRA' if is_on_network else 'FULL'}")
            if is_on_network:
                connection.execute("PRAGMA locking_mode = NORMAL")
            migrations.migrate(self.path, connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _opened_to_read(self) -> sqlite3.Connection:
        """Returns a connection with today's tables: of an older file, a copy in memory."""
        connection = self._connected_to_read()
        try:
            missing = migrations.missing_steps(self.path, connection)
            if missing == len(migrations.STEPS):
                command = repair_command(run_folder_of(self.path))
                raise RunFolderError(
                    f"{self.path}: expected a state database, found an empty file; if this is a "
                    f"run's folder, rebuild the file with: {command}"
                )
            if not missing:
                return connection
            memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            connection.backup(memory)
            migrations.apply_steps(memory, missing)
        except BaseException:
            connection.close()
            self._remove_copy()
            raise
        connection.close()
        self._remove_copy()
        return memory

    def _opened_as_copy(self) -> sqlite3.Connection:
        """Returns a connection to a temporary copy with today's tables."""
        connection = self._opened_to_read() if self.path.exists() else None
        # What a reader without the right to write reads is a copy already.
        read = self._copy
        self._copy = tempfile.TemporaryDirectory(prefix="sensebatch-")
        copy = _connect(Path(self._copy.name) / self.path.name)
        copy.execute("PRAGMA synchronous = OFF")
        if connection is None:
            migrations.apply_steps(copy, len(migrations.STEPS))
            return copy
        connection.backup(copy)
        connection.close()
        if read is not None:
            read.cleanup()
        return copy

    def _connected_to_read(self) -> sqlite3.Connection:
        """Returns a connection that sees every commit, those in the WAL included.

        SQLite needs an index of the WAL beside the file. Who may write there has it made, and
        removed at the end; who may not reads a copy.
        """
        if not _is_writable(self.path):
            return _connect(self._copied())
        connection = _connect(self.path, "?mode=rw")
        connection.execute("PRAGMA query_only = 1")
        return connection

    def _copied(self) -> Path:
        """Returns a copy of the file and of its WAL, as they are between two writes."""
        self._copy = tempfile.TemporaryDirectory(prefix="sensebatch-")
        places = (self.path, _beside(self.path, "-wal"), _beside(self.path, "-journal"))
        sources = [path for path in places if path.exists()]
        try:
            for _ in range(_COPIES):
                before = [_written(path) for path in sources]
                for path in sources:
                    shutil.copyfile(path, Path(self._copy.name) / path.name)
                if before == [_written(path) for path in sources]:
                    return Path(self._copy.name) / self.path.name
        except OSError as error:
            self._remove_copy()
            raise RunFolderError(
                f"{error.filename or self.path}: cannot be read: {reason(error)}"
            ) from error
        self._remove_copy()
        raise RunFolderError(f"{self.path}: was written while it was read; try again")

    def _remove_copy(self) -> None:
        if self._copy is not None:
            self._copy.cleanup()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns SQLite's errors into ones that stop the run and say what to do."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise StorageFullError(
                    f"{self.path}: no room left on the disk; make some and run the same command "
                    "again"
                ) from error
            if code in _STORAGE:
                raise StorageError(
                    f"{self.path}: the file system failed: {error}; run the same command again "
                    "once that is fixed"
                ) from error
            if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
                raise
            raise RunFolderError(
                f"{self.path}: expected a state database: {error}; if this is a run's folder, "
                f"rebuild the file with: {repair_command(run_folder_of(self.path))}"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits what is done inside as one step, on the disk at exit, or nothing of it."""
        with self._lock, self.errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Gives the connection for queries."""
        with self._lock, self.errors():
            yield self._connection

    def close(self) -> None:
        """Closes the file; nothing uncommitted is kept."""
        with self._lock, self.errors():
            self._connection.close()
        self._remove_copy()


def _connect(path: Path, how: str = "") -> sqlite3.Connection:
    return sqlite3.connect(
        path.absolute().as_uri() + how,
        uri=True,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )


def _beside(path: Path, ending: str) -> Path:
    """Returns the path of a file that SQLite keeps beside a database."""
    return path.with_name(f"{path.name}{ending}")


def _is_writable(path: Path) -> bool:
    """Whether this user may write a database, what is beside it, and new files there."""
    beside = [_beside(path, ending) for ending in ("-wal", "-shm", "-journal")]
    places = [path.parent, path, *(one for one in beside if one.exists())]
    return all(os.access(place, os.W_OK) for place in places)


def _written(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
