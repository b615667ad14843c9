"""The SQLite file under the state: how it is opened, and what its errors mean to a user."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sensebatch.errors import RunFolderError, StorageError, StorageFullError
from sensebatch.store import migrations

_BUSY_TIMEOUT_S = 30.0

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
        read_only: Opens an existing file beside the process that writes it.

    Raises:
        RunFolderError: The file is not a state database, or a newer version made it.
        StorageFullError: The disk is full.
        StorageError: The file cannot be read or written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self.errors():
            connection = self._connect(read_only)
            try:
                self._connection = (
                    self._as_of_today(connection) if read_only else self._prepared(connection)
                )
            except BaseException:
                connection.close()
                raise

    def _connect(self, read_only: bool) -> sqlite3.Connection:
        uri = self.path.absolute().as_uri()
        if read_only:
            uri += "?mode=ro"
            if not os.access(self.path.parent, os.W_OK):
                uri += "&immutable=1"
        return sqlite3.connect(
            uri,
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )

    def _prepared(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        """Returns a connection whose file has today's tables, and is written as it has to be."""
        migrations.missing_steps(
            self.path, connection
        )  # refuse a file of others before it is changed
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        migrations.migrate(self.path, connection)
        return connection

    def _as_of_today(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        """Returns a connection with today's tables: of an older file, a copy in memory."""
        missing = migrations.missing_steps(self.path, connection)
        if missing == len(migrations.STEPS):
            raise RunFolderError(f"{self.path}: expected a state database, found an empty file")
        if not missing:
            return connection
        with closing(connection):
            memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            connection.backup(memory)
        migrations.apply_steps(memory, missing)
        return memory

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
            raise RunFolderError(f"{self.path}: expected a state database: {error}") from error

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
