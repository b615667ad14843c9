"""Jobs that start from images of other jobs: their parents. The statements, inside a transaction.

A child is drawn from what its parents are at that time, so the state keeps which attempt of a
parent that was. A child whose parent is drawn again is drawn again too; one whose parent failed is
blocked until the parent is tried again.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from sensebatch.errors import JobError
from sensebatch.jobs import InputImage, Job, folded_id
from sensebatch.store import tables
from sensebatch.store.attempts import BLOCKED, DONE, FAILED, HELD, PENDING, row_from_json
from sensebatch.store.files import reason

_OUTDATED = (
    "EXISTS (SELECT 1 FROM parents JOIN jobs AS own ON own.folded = parents.parent"
    " WHERE parents.child = jobs.folded AND (own.status <> 'done'"
    " OR (parents.drawn IS NOT NULL AND parents.drawn IS NOT own.current)))"
)
"""An SQL condition: whether a job has a parent that is not done, or not what it was drawn from."""
_IN_THE_WAY = (
    f"EXISTS (SELECT 1 FROM parents JOIN jobs AS own ON own.folded = parents.parent"
    f" WHERE parents.child = jobs.folded AND own.status IN ('{FAILED}', '{BLOCKED}'))"
)
"""Whether it has one that failed, or is blocked itself."""


_HELD = (
    f"EXISTS (SELECT 1 FROM parents JOIN jobs AS own ON own.folded = parents.parent"
    f" WHERE parents.child = jobs.folded AND (own.status = '{HELD}'"
    f" OR own.status = '{DONE}' AND own.outputs = '[]'))"
)
"""Whether it has one that is held, or whose image was dropped since it was rejected."""
_IS_TRY = "EXISTS (SELECT 1 FROM tries WHERE tries.job = jobs.folded)"


def has_any(db: sqlite3.Connection) -> bool:
    """Returns whether the folder has a job with parents."""
    return db.execute("SELECT 1 FROM parents LIMIT 1").fetchone() is not None


def link(db: sqlite3.Connection, child: str, parents: Collection[str]) -> None:
    """Records the parents of a job, in place of those it had; all are folded ids."""
    marks = ", ".join("?" * len(parents))
    db.execute(
        f"DELETE FROM parents WHERE child = ? AND parent NOT IN ({marks})", (child, *parents)
    )
    db.executemany(
        "INSERT OR IGNORE INTO parents VALUES (?, ?, NULL)", ((child, parent) for parent in parents)
    )


def draw_again(db: sqlite3.Connection) -> list[int]:
    """Has jobs run again whose parents do, or did since they were drawn; returns their numbers."""
    numbers: list[int] = []
    values = (PENDING, DONE, tables.latest_reading(db))
    # Each round is one generation.
    while found := db.execute(
        "UPDATE jobs SET status = ?, tries = 0, alone = 0, current = NULL"
        f" WHERE status = ? AND seen = ? AND {_OUTDATED} RETURNING number",
        values,
    ).fetchall():
        numbers += [number for (number,) in found]
    return numbers


def is_outdated(db: sqlite3.Connection, number: int) -> bool:
    """Returns whether a job has a parent that is not done, or not what it was drawn from."""
    query = f"SELECT {_OUTDATED} FROM jobs WHERE number = ?"
    return bool(db.execute(query, (number,)).fetchone()[0])


def waits(db: sqlite3.Connection, folded: str) -> bool:
    """Returns whether a job has a parent that is not done."""
    query = (
        "SELECT 1 FROM parents JOIN jobs ON jobs.folded = parents.parent"
        " WHERE parents.child = ? AND jobs.status <> ?"
    )
    return db.execute(query, (folded, DONE)).fetchone() is not None


def settle(db: sqlite3.Connection) -> None:
    """Blocks or holds jobs as their parents are, and lets those run whose parents are not."""
    if not has_any(db):
        return
    reading = tables.latest_reading(db)
    for status, former, condition in (
        (PENDING, BLOCKED, f"NOT {_IN_THE_WAY}"),
        (PENDING, HELD, f"NOT {_HELD} AND NOT {_IS_TRY}"),
        (HELD, PENDING, _HELD),
        (BLOCKED, PENDING, _IN_THE_WAY),
    ):
        # Each round is one generation.
        while db.execute(
            f"UPDATE jobs SET status = ? WHERE status = ? AND seen = ? AND {condition}",
            (status, former, reading),
        ).rowcount:
            pass


def with_inputs(db: sqlite3.Connection, job: Job) -> Job:
    """Returns a job with the files that its parents have made in place of their names.

    An image that is not there stays as it is.
    """
    if all(image.output is None for image in job.images):
        return job
    return replace(job, images=tuple(_as_made(db, image) for image in job.images))


def _as_made(db: sqlite3.Connection, image: InputImage) -> InputImage:
    if image.output is None:
        return image
    parent, index = image.output
    found = db.execute(
        "SELECT row FROM jobs JOIN attempts ON attempts.seq = jobs.current"
        " WHERE folded = ? AND status = ?",
        (folded_id(parent), DONE),
    ).fetchone()
    row = {"image_paths": [], "image_sha256": []} if found is None else row_from_json(found[0])
    if index >= len(row["image_paths"]):
        return image
    return replace(image, path=row["image_paths"][index], sha256=row["image_sha256"][index])


def reading(root: Path, read_file: Callable[[InputImage], bytes]) -> Callable[[InputImage], bytes]:
    """Returns what reads input images: files, and what jobs of the run have made.

    Args:
        root: The run's folder.
        read_file: Reads an image that is there before the run.
    """
    return lambda image: read_file(image) if image.output is None else _read_output(root, image)


def _read_output(root: Path, image: InputImage) -> bytes:
    """Returns the bytes of an image that a job of the run has made.

    Raises:
        JobError: There is none, or it has changed since.
    """
    assert image.output is not None
    parent, index = image.output
    what = f"image {index} of job {parent} (counted from 0)"
    if not image.sha256:
        raise JobError(f"expected {what}, found that it did not make one")
    path = root / image.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JobError(f"{path}: expected {what}: {reason(error)}") from error
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise JobError(f"{path}: expected {what} as it was drawn, found that it has changed")
    return content
