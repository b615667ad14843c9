"""The tables of state.db, as numbered steps from an empty file to today's; forwards only.

A step that a release had is never edited: folders that it made exist. A change of the tables is a
new step at the end.

Source: the shape of simonw/llm `llm/migrations.py`.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sensebatch.errors import RunFolderError
from sensebatch.store.files import storage_errors, sync_folders

_FIRST = """
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

_STARTS = """
ALTER TABLE batches ADD COLUMN starts INTEGER NOT NULL DEFAULT 0;  -- not followed by a clean stop
ALTER TABLE batches ADD COLUMN rounds INTEGER NOT NULL DEFAULT 0;  -- kept when it last started
ALTER TABLE batches ADD COLUMN suspect INTEGER NOT NULL DEFAULT 0; -- a process may have died of it
"""

_READING = """
CREATE TABLE inputs (                -- files that the latest reading of manifests depended on
    path TEXT PRIMARY KEY,
    stamp TEXT NOT NULL              -- size and times; empty where they do not tell every change
) WITHOUT ROWID;
"""

_CURRENT = """
ALTER TABLE jobs ADD COLUMN current INTEGER;    -- the attempt that says what the job is now
ALTER TABLE jobs ADD COLUMN finish_reason TEXT; -- of that attempt
CREATE INDEX attempts_of_job ON attempts (job_id);
UPDATE jobs SET current = (
    SELECT max(seq) FROM attempts WHERE job_id = jobs.id
    AND json_extract(row, '$.key') = jobs.key AND json_extract(row, '$.status') = jobs.status
);
"""

_PARENTS = """
CREATE TABLE parents (               -- jobs that start from images of other jobs; folded ids
    child TEXT NOT NULL,
    parent TEXT NOT NULL,
    drawn INTEGER,                   -- the parent's attempt that the child was last drawn from
    PRIMARY KEY (child, parent)
) WITHOUT ROWID;
CREATE INDEX children ON parents (parent);
"""

_TRIES = """
CREATE TABLE tries (                 -- jobs of which only as many run as are needed; folded ids
    job TEXT PRIMARY KEY,
    series TEXT NOT NULL,
    number INTEGER NOT NULL,         -- in the series, from 0
    keep INTEGER NOT NULL            -- how many of the series are to be accepted
) WITHOUT ROWID;
CREATE TABLE verdicts (              -- questions that decide whether a try is accepted
    judge TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    answer TEXT NOT NULL,
    at_least REAL NOT NULL           -- the probability that the answer must have
) WITHOUT ROWID;
CREATE INDEX tries_of_series ON tries (series, number);
CREATE INDEX verdicts_on_job ON verdicts (job);
"""

STEPS = (_FIRST, _STARTS, _READING, _CURRENT, _PARENTS, _TRIES)
"""SQL scripts, in order. `PRAGMA user_version` of a file says how many of them it has had."""


class NewerVersionError(RunFolderError):
    """A state database that a newer version made."""


def missing_steps(path: Path, db: sqlite3.Connection) -> int:
    """Returns how many steps a file has not had; all of them where it is empty.

    Raises:
        RunFolderError: The file is not a state database, or a newer version made it.
    """
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found > len(STEPS):
        raise NewerVersionError(
            f"{path}: made by a newer sensebatch (state format {found}, this version reads up to "
            f"{len(STEPS)}); update sensebatch, or give another --output-dir"
        )
    if not found and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise RunFolderError(f"{path}: expected a state database, found another SQLite file")
    return len(STEPS) - found


def migrate(path: Path, db: sqlite3.Connection) -> None:
    """Brings an open file to today's tables in one transaction, after copying an older one.

    Raises:
        RunFolderError: The file is not a state database, or a newer version made it.
        StorageFullError: There is no room for the copy.
        sqlite3.Error: The file cannot be changed; it is as it was.
    """
    missing = missing_steps(path, db)
    if not missing:
        return
    if missing < len(STEPS):
        _copy(path, db, len(STEPS) - missing)
    apply_steps(db, missing)


def apply_steps(db: sqlite3.Connection, count: int) -> None:
    """Applies the last `count` steps in one transaction."""
    script = "".join(STEPS[len(STEPS) - count :])
    try:
        db.executescript(f"BEGIN IMMEDIATE;{script}PRAGMA user_version = {len(STEPS)};COMMIT;")
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _copy(path: Path, db: sqlite3.Connection, version: int) -> None:
    """Keeps the file as it is, with what its WAL holds, as `state.db.format-N`."""
    copy = path.with_name(f"{path.name}.format-{version}")
    temporary = path.with_name(f".{copy.name}.tmp")
    with storage_errors(copy):
        # SQLite would take a file that a killed process left for the end of the copy.
        temporary.unlink(missing_ok=True)
        with closing(sqlite3.connect(temporary)) as target:
            db.backup(target)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, copy)  # noqa: PTH105, one name to stop at in tests
    sync_folders([copy], path.parent)
