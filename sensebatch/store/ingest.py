"""Reading manifests into the state: what is new, what changed, what is gone, what came back."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sensebatch.errors import ManifestError, Problem
from sensebatch.jobs import GroupKey, Job, ModelIdentity, folded_id, job_key
from sensebatch.plan.batches import plan_entry
from sensebatch.store import tables
from sensebatch.store.attempts import DONE, PENDING, digests_of, row_from_json
from sensebatch.store.codec import group_to_json, job_from_json, job_to_json
from sensebatch.store.files import sha256_of

_MAX_PROBLEMS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What a new reading of the manifests changed."""

    jobs: int
    added: int
    changed: int
    """Jobs with an old id and a new definition that had been tried; they run again."""
    removed: int
    """Jobs that are no longer in the manifests; their files are kept."""
    unread: int
    """Jobs of earlier readings that this one ended before; they stay as they are."""
    restored: int
    """Done jobs whose files are gone; they run again."""
    returned: int
    """Jobs that have a definition again which they were done with, and its files; they are done."""


class _Row(NamedTuple):
    """What is read of a known job to see whether it changed."""

    number: int
    id: str
    seen: int
    position: int
    key: str
    definition: str
    wanted: int
    attempts: int
    outputs: str


class Ingest:
    """One reading of the manifests into the jobs table."""

    def __init__(self, db: sqlite3.Connection, identity: ModelIdentity) -> None:
        self._db = db
        self._identity = identity
        self._number = tables.increment(db, "reading")
        self._jobs = self._added = self._num_problems = 0
        self._changed: set[int] = set()
        self._problems: list[Problem] = []
        self._group_number = lru_cache(maxsize=None)(self._find_group)

    def add(self, position: int, job: Job) -> None:
        """Inserts, updates or confirms one job."""
        self._jobs += 1
        key = job_key(job, self._identity)
        definition = job_to_json(job)
        folded = folded_id(job.id)
        row = self._db.execute(
            "SELECT number, id, seen, position, key, definition, wanted, attempts, outputs"
            " FROM jobs WHERE folded = ?",
            (folded,),
        ).fetchone()
        old = None if row is None else _Row._make(row)
        if old is not None and old.id != job.id and self._is_forgotten(old):
            self._db.execute("DELETE FROM jobs WHERE number = ?", (old.number,))
            old = None
        if old is None:
            self._insert(position, job, key, definition, folded)
        elif old.id != job.id or old.seen == self._number:
            self._clash(job, old)
        else:
            self._update(position, job, key, definition, old)

    def _is_forgotten(self, old: _Row) -> bool:
        """Whether a job of earlier manifests has made nothing that its name must keep."""
        return old.seen != self._number and old.outputs == "[]"

    def _insert(self, position: int, job: Job, key: str, definition: str, folded: str) -> None:
        entry = plan_entry(job)
        self._added += 1
        self._db.execute(
            "INSERT INTO jobs VALUES (NULL, ?, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?, 0, 0, 0, '[]')",
            (
                folded,
                job.id,
                position,
                self._number,
                key,
                self._group_number(entry.group),
                entry.max_images,
                entry.prompt_tokens,
                entry.text_tokens,
                definition,
                PENDING,
            ),
        )

    def _update(self, position: int, job: Job, key: str, definition: str, old: _Row) -> None:
        if (old.position, old.key, old.definition, old.wanted) == (position, key, definition, 1):
            self._db.execute(
                "UPDATE jobs SET seen = ? WHERE number = ?", (self._number, old.number)
            )
            return
        entry = plan_entry(job)
        self._db.execute(
            "UPDATE jobs SET seen = ?, position = ?, wanted = 1, key = ?, group_number = ?,"
            " max_images = ?, prompt_tokens = ?, text_tokens = ?, definition = ?"
            " WHERE number = ?",
            (
                self._number,
                position,
                key,
                self._group_number(entry.group),
                entry.max_images,
                entry.prompt_tokens,
                entry.text_tokens,
                definition,
                old.number,
            ),
        )
        if key != old.key:
            if old.attempts:
                self._changed.add(old.number)
            self._db.execute(
                "UPDATE jobs SET status = ?, tries = 0, alone = 0 WHERE number = ?",
                (PENDING, old.number),
            )

    def _clash(self, job: Job, old: _Row) -> None:
        self._num_problems += 1
        if len(self._problems) < _MAX_PROBLEMS:
            other = job_from_json(old.definition)
            found = f"{job.id!r} again (first in {other.source.file}: {other.source.row})"
            if job.id != old.id:
                found = (
                    f"{job.id!r}, which a disk that ignores case takes for {old.id!r} "
                    f"({other.source.file}: {other.source.row})"
                )
            self._problems.append(
                Problem(
                    file=job.source.file,
                    row=job.source.row,
                    field="id",
                    message=f"expected an id of its own, found {found}",
                )
            )

    def _find_group(self, group: GroupKey) -> int:
        text = group_to_json(group)
        self._db.execute("INSERT OR IGNORE INTO groups VALUES (NULL, ?)", (text,))
        query = "SELECT number FROM groups WHERE definition = ?"
        return self._db.execute(query, (text,)).fetchone()[0]

    def finish(self, root: Path, limit: int | None) -> Changes:
        """Marks the jobs that were not read, and those whose files are gone.

        Args:
            root: The run's folder.
            limit: After how many jobs the reading ended; jobs that it did not reach stay wanted.
        """
        if self._problems:
            raise ManifestError(self._problems, self._num_problems)
        removed = unread = 0
        if self._jobs == limit:
            unread = self._db.execute(
                "SELECT count(*) FROM jobs WHERE wanted = 1 AND seen <> ?", (self._number,)
            ).fetchone()[0]
        else:
            removed = self._db.execute(
                "UPDATE jobs SET wanted = 0 WHERE wanted = 1 AND seen <> ?", (self._number,)
            ).rowcount
        done = self._db.execute(
            "SELECT number, outputs FROM jobs WHERE seen = ? AND status = ?", (self._number, DONE)
        )
        gone = [
            (PENDING, number)
            for number, outputs in done
            if not all((root / path).is_file() for path in json.loads(outputs))
        ]
        self._db.executemany(
            "UPDATE jobs SET status = ?, tries = 0, alone = 0 WHERE number = ?", gone
        )
        returned = self._returned(root)
        self._db.executemany(
            "UPDATE jobs SET status = ? WHERE number = ?", ((DONE, number) for number in returned)
        )
        self._drop_outdated_batches()
        return Changes(
            jobs=self._jobs,
            added=self._added,
            changed=len(self._changed - returned),
            removed=removed,
            unread=unread,
            restored=len(gone),
            returned=len(returned),
        )

    def _returned(self, root: Path) -> set[int]:
        """Returns jobs to be run whose last success was of their key, and left the files there are.

        A run of another definition, such as one that was started by mistake, may have ended before
        it made anything of them; or after it replaced a file, so that a key alone says too little.
        """
        to_run = "seen = ? AND status = ? AND outputs <> '[]'"
        values = (self._number, PENDING)
        keys = {
            job_id: (number, key)
            for number, job_id, key in self._db.execute(
                f"SELECT number, id, key FROM jobs WHERE {to_run}", values
            )
        }
        if not keys:
            return set()
        made: dict[str, list[tuple[str, str]]] = {}
        attempts = self._db.execute(
            "SELECT job_id, row FROM attempts"
            f" WHERE job_id IN (SELECT id FROM jobs WHERE {to_run}) ORDER BY seq",
            values,
        )
        for job_id, text in attempts:
            row = row_from_json(text)
            if row["status"] == DONE:
                is_own = row["key"] == keys[job_id][1]
                made[job_id] = digests_of(row) if is_own else []
        return {
            keys[job_id][0]
            for job_id, files in made.items()
            if files and all(sha256_of(root / path) == digest for path, digest in files)
        }

    def _drop_outdated_batches(self) -> None:
        """Forgets started batches of which a job changed or is no longer wanted."""
        query = "SELECT key FROM jobs WHERE folded = ? AND wanted = 1 AND status = ?"
        for batch in tables.started_batches(self._db):
            for job_id, key in batch.members:
                if self._db.execute(query, (folded_id(job_id), PENDING)).fetchone() != (key,):
                    self._db.execute("DELETE FROM batches WHERE seq = ?", (batch.seq,))
                    break
