"""The statements that both reading manifests and running batches need; inside a transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from sensebatch.jobs import folded_id
from sensebatch.store.attempts import DONE, FAILED, PENDING, Attempt, attempt_to_json


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedBatch:
    """A batch that was begun and not committed."""

    seq: int
    """Its number; never used twice in a folder."""
    members: tuple[tuple[str, str], ...]
    """(id, key) of each job, in the batch's order."""
    starts: int
    """How often it was started without an end: a commit, a split, a clean stop, a kept image."""
    is_suspect: bool
    """Whether it is a single job of a batch that processes died of."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of its jobs, in its order."""
        return tuple(job_id for job_id, _ in self.members)


def increment(db: sqlite3.Connection, name: str) -> int:
    """Returns the next value of a counter; the first is 1."""
    row = db.execute(
        "INSERT INTO meta VALUES (?, '1') ON CONFLICT (name)"
        " DO UPDATE SET value = CAST(value AS INTEGER) + 1 RETURNING value",
        (name,),
    ).fetchone()
    return int(row[0])


def latest_reading(db: sqlite3.Connection) -> int:
    """Returns the number of the latest reading of the manifests; 0 before the first."""
    row = db.execute("SELECT value FROM meta WHERE name = 'reading'").fetchone()
    return 0 if row is None else int(row[0])


def is_read(db: sqlite3.Connection, job_id: str) -> bool:
    """Returns whether the latest reading of the manifests had a job."""
    query = "SELECT 1 FROM jobs WHERE folded = ? AND seen = ?"
    return db.execute(query, (folded_id(job_id), latest_reading(db))).fetchone() is not None


def started_batches(db: sqlite3.Connection) -> list[StartedBatch]:
    """Returns the batches that were begun and not committed, in the order they were begun."""
    rows = db.execute("SELECT seq, members, starts, suspect FROM batches ORDER BY seq").fetchall()
    return [
        StartedBatch(
            seq=seq,
            members=tuple((job_id, key) for job_id, key in json.loads(members)),
            starts=starts,
            is_suspect=bool(suspect),
        )
        for seq, members, starts, suspect in rows
    ]


def insert_batch(
    db: sqlite3.Connection,
    members: Sequence[tuple[str, str]],
    *,
    starts: int,
    is_suspect: bool = False,
) -> int:
    """Records a batch of these (id, key); returns its number."""
    text = json.dumps([list(member) for member in members])
    seq = db.execute(
        "INSERT INTO batches (members, starts, suspect) VALUES (?, ?, ?)",
        (text, starts, is_suspect),
    ).lastrowid
    assert seq is not None
    return seq


def record_attempts(
    db: sqlite3.Connection, attempts: Sequence[Attempt], max_attempts: int
) -> list[str]:
    """Writes rows of the log with what they mean for their jobs; returns files now stale."""
    stale: list[str] = []
    for attempt in attempts:
        db.execute(
            "INSERT INTO attempts (job_id, row) VALUES (?, ?)",
            (attempt.job_id, attempt_to_json(attempt)),
        )
        job = (folded_id(attempt.job_id),)
        if attempt.status == FAILED:
            db.execute(
                "UPDATE jobs SET attempts = attempts + 1, tries = tries + 1, alone = 1,"
                " status = CASE WHEN tries + 1 >= ? THEN ? ELSE ? END WHERE folded = ?",
                (max_attempts, FAILED, PENDING, *job),
            )
            continue
        (old,) = db.execute("SELECT outputs FROM jobs WHERE folded = ?", job).fetchone()
        stale += sorted(set(json.loads(old)) - set(attempt.outputs))
        db.execute(
            "UPDATE jobs SET attempts = attempts + 1, tries = tries + 1, status = ?, outputs = ?"
            " WHERE folded = ?",
            (DONE, json.dumps(attempt.outputs), *job),
        )
    db.executemany("INSERT OR IGNORE INTO stale VALUES (?)", ((path,) for path in stale))
    return stale
