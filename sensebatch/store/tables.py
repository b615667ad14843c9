"""The statements that both reading manifests and running batches need; inside a transaction."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from sensebatch.jobs import GroupKey, Job, folded_id
from sensebatch.plan.batches import plan_entry
from sensebatch.store.attempts import DONE, FAILED, PENDING, Attempt, attempt_to_json
from sensebatch.store.codec import group_to_json
from sensebatch.store.files import can_be_named, is_file


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedBatch:
    """A batch that was begun and not committed."""

    seq: int
    """Its number; never used twice in a folder."""
    members: tuple[tuple[str, str], ...]
    """(id, key) of each job, in the batch's order."""
    starts: int
    """How often in a row it was started without an end: a commit, a split or a clean stop."""
    rounds: int
    """Rounds of kept images that it had when it was last started."""
    is_suspect: bool
    """Whether it is a single job of a batch that processes died of."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of its jobs, in its order."""
        return tuple(job_id for job_id, _ in self.members)


Span: TypeAlias = tuple[int, int]
"""The jobs between two places in the manifests, both included."""
WHOLE: Span = (0, 2**63 - 1)
"""All jobs."""

LOG = "log.parquet"
"""Name in `meta`: the SHA-256 of the log as it was last written."""

LISTED = "(jobs.wanted OR NOT EXISTS (SELECT 1 FROM meta WHERE name = 'reading'))"
"""An SQL condition: whether a job is in the manifests, or none were read since a repair."""

EXTENSION = "extension"
"""Name in `meta`: the extension of the images that started batches write."""


def get_meta(db: sqlite3.Connection, name: str) -> str | None:
    """Returns a value that is kept under a name; None where there is none."""
    row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def set_meta(db: sqlite3.Connection, name: str, value: str) -> None:
    """Keeps a value under a name."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))


def forget_log(db: sqlite3.Connection, *, parts: bool = False) -> None:
    """Has the log written again, because what it says has changed.

    Args:
        db: Inside a transaction.
        parts: Whether rows have changed, not only their marks.
    """
    db.execute("DELETE FROM meta WHERE name = ?", (LOG,))
    if parts:
        db.execute("DELETE FROM meta WHERE name LIKE 'log/%'")


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
    return int(get_meta(db, "reading") or 0)


def is_read(db: sqlite3.Connection, job_id: str) -> bool:
    """Returns whether the latest reading of the manifests had a job."""
    query = "SELECT 1 FROM jobs WHERE folded = ? AND seen = ?"
    return db.execute(query, (folded_id(job_id), latest_reading(db))).fetchone() is not None


def has_pending(db: sqlite3.Connection, span: Span = WHOLE) -> bool:
    """Returns whether one of some jobs is to be run, or is running."""
    query = (
        "SELECT 1 FROM jobs WHERE wanted = 1 AND status = ? AND seen = ?"
        " AND position BETWEEN ? AND ? LIMIT 1"
    )
    return db.execute(query, (PENDING, latest_reading(db), *span)).fetchone() is not None


def started_batches(db: sqlite3.Connection) -> list[StartedBatch]:
    """Returns the batches that were begun and not committed, in the order they were begun."""
    rows = db.execute(
        "SELECT seq, members, starts, rounds, suspect FROM batches ORDER BY seq"
    ).fetchall()
    return [
        StartedBatch(
            seq=seq,
            members=tuple((job_id, key) for job_id, key in json.loads(members)),
            starts=starts,
            rounds=rounds,
            is_suspect=bool(suspect),
        )
        for seq, members, starts, rounds, suspect in rows
    ]


def insert_batch(
    db: sqlite3.Connection,
    members: Sequence[tuple[str, str]],
    *,
    starts: int,
    is_suspect: bool = False,
    seq: int | None = None,
) -> int:
    """Records a batch of these (id, key); returns its number, a new one unless `seq` is given."""
    text = json.dumps([list(member) for member in members])
    seq = db.execute(
        "INSERT INTO batches (seq, members, starts, suspect) VALUES (?, ?, ?, ?)",
        (seq, text, starts, is_suspect),
    ).lastrowid
    assert seq is not None
    return seq


def leftovers(db: sqlite3.Connection, root: Path, batch: StartedBatch) -> list[str]:
    """Returns files of a batch that was never committed, as paths in the run's folder.

    They have the names that the batch writes to, and no job is done with them.

    Raises:
        OSError: The folder cannot be read.
    """
    extension = get_meta(db, EXTENSION)
    if extension is None:  # begun by an earlier version, which did not say
        return []
    found = []
    for job_id in filter(can_be_named, batch.ids):
        query = "SELECT outputs FROM jobs WHERE folded = ?"
        row = db.execute(query, (folded_id(job_id),)).fetchone()
        named = set(json.loads(row[0])) if row else set()
        names = [f"images/{job_id}.{extension}", f"text/{job_id}.txt"]
        folder = root / "images" / job_id
        if folder.is_dir():
            several = re.compile(rf"[0-9]{{3,}}\.{extension}")
            inside = (path.name.removeprefix(".").removesuffix(".tmp") for path in folder.iterdir())
            names += [f"images/{job_id}/{name}" for name in inside if several.fullmatch(name)]
        for name in names:
            path = PurePosixPath(name)
            unfinished = str(path.with_name(f".{path.name}.tmp"))
            found += [one for one in (name, unfinished) if one not in named]
    return sorted({name for name in found if is_file(f"{root}/{name}")})


def group_number(db: sqlite3.Connection, group: GroupKey) -> int:
    """Returns the number of a group, which it gets if it has none."""
    text = group_to_json(group)
    db.execute("INSERT OR IGNORE INTO groups VALUES (NULL, ?)", (text,))
    query = "SELECT number FROM groups WHERE definition = ?"
    return db.execute(query, (text,)).fetchone()[0]


def insert_job(
    db: sqlite3.Connection,
    job: Job,
    *,
    group_number: int,
    key: str,
    definition: str,
    position: int,
    seen: int,
) -> int:
    """Inserts a job that is to be run; returns its number.

    Args:
        db: Inside a transaction.
        job: The job.
        group_number: Its group's number.
        key: Its key.
        definition: The job as JSON.
        position: Its place in the manifests.
        seen: The number of the reading that has it; 0 for a job that no manifest is known to have.
    """
    entry = plan_entry(job)
    number = db.execute(
        "INSERT INTO jobs VALUES"
        " (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0, 0, '[]', NULL, NULL)",
        (
            folded_id(job.id),
            job.id,
            position,
            seen,
            seen > 0,
            key,
            group_number,
            entry.max_images,
            entry.prompt_tokens,
            entry.text_tokens,
            definition,
            PENDING,
        ),
    ).lastrowid
    assert number is not None
    return number


def add_stale(db: sqlite3.Connection, names: Iterable[str]) -> None:
    """Records files that are to be removed."""
    db.executemany("INSERT OR IGNORE INTO stale VALUES (?)", ((name,) for name in names))


def replace_job(db: sqlite3.Connection, number: int, *, by: int) -> None:
    """Gives a job the name and the place of another one, which disappears."""
    names = (
        "folded, id, position, seen, wanted, group_number, max_images, prompt_tokens, text_tokens,"
        " definition"
    )
    values = db.execute(f"SELECT {names} FROM jobs WHERE number = ?", (by,)).fetchone()
    db.execute("DELETE FROM jobs WHERE number = ?", (by,))
    marks = ", ".join("?" * len(values))
    db.execute(f"UPDATE jobs SET ({names}) = ({marks}) WHERE number = ?", (*values, number))


def rename_jobs(db: sqlite3.Connection, names: Mapping[str, str]) -> None:
    """Brings what is recorded of jobs to their new ids; the rows of the log stay as they are."""
    if not names:
        return
    db.execute("CREATE TEMP TABLE renamed (old TEXT PRIMARY KEY, new TEXT NOT NULL)")
    db.executemany("INSERT INTO renamed VALUES (?, ?)", names.items())
    db.execute(
        "UPDATE attempts SET job_id = (SELECT new FROM renamed WHERE old = job_id)"
        " WHERE job_id IN (SELECT old FROM renamed)"
    )
    db.execute("DROP TABLE renamed")
    for batch in started_batches(db):
        members = json.dumps([[names.get(job_id, job_id), key] for job_id, key in batch.members])
        db.execute("UPDATE batches SET members = ? WHERE seq = ?", (members, batch.seq))


def record_attempts(
    db: sqlite3.Connection, attempts: Sequence[Attempt], max_attempts: int
) -> list[str]:
    """Writes rows of the log with what they mean for their jobs; returns files now stale."""
    stale: list[str] = []
    for attempt in attempts:
        seq = db.execute(
            "INSERT INTO attempts (job_id, row) VALUES (?, ?)",
            (attempt.job_id, attempt_to_json(attempt)),
        ).lastrowid
        job = (folded_id(attempt.job_id),)
        db.execute(
            "UPDATE jobs SET attempts = attempts + 1, tries = tries + 1, current = ?,"
            " finish_reason = ? WHERE folded = ?",
            (seq, attempt.finish_reason, *job),
        )
        if attempt.status == FAILED:
            db.execute(
                "UPDATE jobs SET alone = 1, status = CASE WHEN tries >= ? THEN ? ELSE ? END"
                " WHERE folded = ?",
                (1 if attempt.is_truncated else max_attempts, FAILED, PENDING, *job),
            )
            continue
        (old,) = db.execute("SELECT outputs FROM jobs WHERE folded = ?", job).fetchone()
        stale += sorted(set(json.loads(old)) - set(attempt.outputs))
        db.execute(
            "UPDATE jobs SET status = ?, outputs = ? WHERE folded = ?",
            (DONE, json.dumps(attempt.outputs), *job),
        )
        # A child was drawn from its parents as they are now: none of them ran meanwhile.
        db.execute(
            "UPDATE parents SET drawn = (SELECT current FROM jobs WHERE folded = parents.parent)"
            " WHERE child = ?",
            job,
        )
    add_stale(db, stale)
    return stale
