"""The SQLite file under the state: how it is opened, and what its errors mean to a user."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sensebatch.errors import RunFolderError, StorageFullError

FORMAT = 1
"""Raised when the tables change; kept in the file as `user_version`."""

_BUSY_TIMEOUT_S = 30.0

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (number INTEGER PRIMARY KEY, definition TEXT NOT NULL UNIQUE);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY,
    folded TEXT NOT NULL UNIQUE,     -- the id as a disk that ignores case sees it
    id TEXT NOT NULL,
    position INTEGER NOT NULL,       -- in the manifests
    seen INTEGER NOT NULL,           -- the last reading of the manifests that had the job
    wanted INTEGER NOT NULL,         -- whether the manifests have it, as far as is known
    key TEXT NOT NULL,
    group_number INTEGER NOT NULL REFERENCES groups,
    max_images INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,  -- estimates, for the memory plan
    text_tokens INTEGER NOT NULL,
    definition TEXT NOT NULL,
    status TEXT NOT NULL,            -- pending, done or failed
    attempts INTEGER NOT NULL,       -- rows in the log
    tries INTEGER NOT NULL,          -- attempts that count against max_attempts
    alone INTEGER NOT NULL,          -- whether it failed before, and runs in a batch of its own
    outputs TEXT NOT NULL            -- JSON list of the files of its last success
);
CREATE INDEX jobs_todo ON jobs (wanted, status, position);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    members TEXT NOT NULL            -- JSON list of [id, key]: started and not committed
);
CREATE TABLE attempts (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL,
    row TEXT NOT NULL                -- JSON, a row of the log
);
CREATE TABLE stale (path TEXT PRIMARY KEY) WITHOUT ROWID;
"""


class Database:
    """One connection, shared by threads, one transaction at a time.

    Args:
        path: The file.
        read_only: Opens an existing file beside the process that writes it.

    Raises:
        RunFolderError: The file is no state database, or of another version.
        StorageFullError: The disk is full.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self.errors():
            self._connection = self._connect(read_only)
            try:
                self._prepare(read_only)
            except BaseException:
                self._connection.close()
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

    def _prepare(self, read_only: bool) -> None:
        connection = self._connection
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found != FORMAT and (tables or found or read_only):
            raise RunFolderError(
                f"{self.path}: expected a state database of format {FORMAT}, found "
                + (f"format {found}" if found else "another file")
            )
        if read_only:
            return
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if not tables:
            connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {FORMAT};COMMIT;")

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
