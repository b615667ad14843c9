"""Reading manifests into the state: what is new, changed, removed, missing or back again."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sensebatch.declarations import stated
from sensebatch.errors import ManifestError, Problem
from sensebatch.jobs import Job, ModelIdentity, folded_id, group_key, job_key, parents_of
from sensebatch.plan.batches import plan_entry
from sensebatch.store import acceptance, chains, tables
from sensebatch.store.attempts import DONE, HELD, PENDING, digests_of, row_from_json
from sensebatch.store.codec import job_from_json, job_to_json
from sensebatch.store.files import is_file, sha256_of, storage_errors
from sensebatch.store.manifests import Reading
from sensebatch.tasks import Task

MADE_AGAIN = "an image it starts from is made again"
"""Why a job is drawn again that itself is as before."""
_MAX_PROBLEMS = 100
_CHUNK = 500
"""Jobs that are compared with the state at a time."""
_DERIVED_ID = re.compile(rf"({'|'.join(Task)})-[0-9a-f]{{16}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraw:
    """Done jobs that run again although nothing about them has changed but the model's settings."""

    jobs: int
    reasons: tuple[str, ...]
    """What has changed, such as `dtype float32 instead of bfloat16`; the most frequent first."""


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
    """Done jobs whose files are missing; they run again."""
    returned: int
    """Jobs that have a definition again which they were done with, and its files; they are done."""
    descendants: int = 0
    """Done jobs that start from images of jobs which run again; they run again too."""
    undropped: int = 0
    """Rejected jobs whose images were removed, and which are wanted now; they are drawn again."""
    held: int = 0
    """Jobs that would be counted above and run again only if they are needed."""
    redraw: Redraw | None = None
    """What the model alone makes of done jobs; None if it leaves all as they are."""
    reasons: Mapping[int, str] = field(default_factory=dict, compare=False, repr=False)
    """Why jobs with files run again, by their numbers in the state."""


class _Row(NamedTuple):
    """What is read of a known job to see whether it changed."""

    folded: str
    number: int
    id: str
    seen: int
    position: int
    key: str
    definition: str
    wanted: int
    attempts: int
    outputs: str
    status: str
    current: int | None


class _New(NamedTuple):
    """A job as it was read."""

    folded: str
    position: int
    job: Job
    key: str
    definition: str


class Ingest:
    """One reading of the manifests into the jobs table.

    Args:
        db: Inside a transaction.
        identity: The model, on which every key depends.
        reading: What the jobs are read from.
    """

    def __init__(self, db: sqlite3.Connection, identity: ModelIdentity, reading: Reading) -> None:
        self._db = db
        self._identity = identity
        self._reading = reading
        self._number = tables.latest_reading(db)
        self._jobs = self._added = self._same = self._replaced = self._num_problems = 0
        self._changed: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._of_model: set[int] = set()
        """Done jobs that only the model makes run again."""
        self._keys: dict[str, str] = {}
        """Keys of the jobs that are compared now, by folded id."""
        self._keys_of_parents: dict[str, str] = {}
        self._redefined: set[str] = set()
        """Jobs with files whose definition changed, or that of one they start from."""
        self._has_chains = chains.has_any(db)
        self._has_tries = acceptance.has_any(db)
        self._is_other = False
        """Whether a job that was known is another one now, or has another place."""
        self._problems: list[Problem] = []
        self._group_number = lru_cache(maxsize=None)(partial(tables.group_number, db))

    def read(self, jobs: Iterable[Job]) -> None:
        """Inserts, updates or confirms jobs, in their order; lets through what `jobs` raises.

        Raises:
            ManifestError: Two jobs have the same id, or ids that a disk which ignores case takes
                for the same.
        """
        self._reading.begin()
        self._number = tables.increment(self._db, "reading")
        numbered = enumerate(jobs)
        while chunk := list(islice(numbered, _CHUNK)):
            self._keys.clear()
            self._compare([self._new(position, job) for position, job in chunk])
        if self._problems:
            raise ManifestError(self._problems, self._num_problems)

    def confirm(self) -> None:
        """Takes the jobs as the latest reading left them."""
        query = "SELECT count(*) FROM jobs WHERE seen = ?"
        (self._jobs,) = self._db.execute(query, (self._number,)).fetchone()

    def _new(self, position: int, job: Job) -> _New:
        self._jobs += 1
        parents = {parent: self._parent_key(job, parent) for parent in parents_of(job)}
        self._keys_of_parents |= parents
        key = self._keys[folded_id(job.id)] = job_key(job, self._identity, parents)
        return _New(
            folded=folded_id(job.id),
            position=position,
            job=job,
            key=key,
            definition=job_to_json(job),
        )

    def _parent_key(self, job: Job, parent: str) -> str:
        """Returns the key of a job that another one starts from an image of.

        Raises:
            ManifestError: It was not read before.
        """
        folded = folded_id(parent)
        if folded in self._keys:
            return self._keys[folded]
        query = "SELECT key FROM jobs WHERE folded = ? AND seen = ?"
        found = self._db.execute(query, (folded, self._number)).fetchone()
        if found is None:
            message = f"expected job {parent} before the one that starts from it, found none"
            source = job.source
            raise ManifestError(
                [Problem(file=source.file, row=source.row, field="image", message=message)]
            )
        return found[0]

    def _compare(self, chunk: Sequence[_New]) -> None:
        """Brings some jobs into the table."""
        rows = self._db.execute(
            f"SELECT {', '.join(_Row._fields)} FROM jobs"
            f" WHERE folded IN ({', '.join('?' * len(chunk))})",
            [new.folded for new in chunk],
        )
        known = {row.folded: row for row in map(_Row._make, rows)}
        unchanged = []
        for new in chunk:
            old = known.get(new.folded)
            if old is not None and old.id != new.job.id and self._is_forgotten(old):
                self._db.execute("DELETE FROM jobs WHERE number = ?", (old.number,))
                old = None
            if old is None:
                old = self._insert(new)
            elif old.id != new.job.id or old.seen == self._number:
                self._clash(new.job, old)
            elif self._is_unchanged(new, old):
                self._same += 1
                unchanged.append((self._number, old.number))
            else:
                self._update(new, old)
            known[new.folded] = old._replace(seen=self._number)
            self._reading.add(image.path for image in new.job.images if image.output is None)
            self._reading.add_absent(image.absent for image in new.job.images if image.absent)
            if new.job.attempt_at or new.job.verdict or self._has_tries:
                acceptance.link(self._db, new.job)
            if new.job.level or self._has_chains:
                chains.link(self._db, new.folded, [folded_id(one) for one in parents_of(new.job)])
        self._db.executemany("UPDATE jobs SET seen = ? WHERE number = ?", unchanged)

    def _is_forgotten(self, old: _Row) -> bool:
        """Whether a job of earlier manifests has made nothing that its name must keep."""
        return old.seen != self._number and old.outputs == "[]"

    def _is_unchanged(self, new: _New, old: _Row) -> bool:
        """Whether the table says of a job what it says now."""
        found = (old.position, old.key, old.definition, old.wanted)
        return found == (new.position, new.key, new.definition, 1)

    def _insert(self, new: _New) -> _Row:
        self._added += 1
        number = tables.insert_job(
            self._db,
            new.job,
            group_number=self._group_number(group_key(new.job)),
            key=new.key,
            definition=new.definition,
            position=new.position,
            seen=self._number,
        )
        return _Row(
            folded=new.folded,
            number=number,
            id=new.job.id,
            seen=self._number,
            position=new.position,
            key=new.key,
            definition=new.definition,
            wanted=1,
            attempts=0,
            outputs="[]",
            status=PENDING,
            current=None,
        )

    def _update(self, new: _New, old: _Row) -> None:
        self._is_other = True
        entry = plan_entry(new.job)
        self._db.execute(
            "UPDATE jobs SET seen = ?, position = ?, wanted = 1, key = ?, group_number = ?,"
            " max_images = ?, prompt_tokens = ?, text_tokens = ?, definition = ?"
            " WHERE number = ?",
            (
                self._number,
                new.position,
                new.key,
                self._group_number(entry.group),
                entry.max_images,
                entry.prompt_tokens,
                entry.text_tokens,
                new.definition,
                old.number,
            ),
        )
        if new.key == old.key:
            self._same += 1
            return
        if old.attempts:
            self._changed.add(old.number)
        if old.outputs != "[]":
            self._explain(old, new)
        self._replaced += old.outputs != "[]"
        self._db.execute(
            "UPDATE jobs SET status = ?, tries = 0, alone = 0, current = NULL WHERE number = ?",
            (PENDING, old.number),
        )

    def _explain(self, old: _Row, new: _New) -> None:
        """Notes why a job with files runs again."""
        before = job_from_json(old.definition)
        parents = {parent: self._keys_of_parents.get(parent, "") for parent in parents_of(before)}
        if job_key(before, self._identity, parents) != new.key:
            self._reasons[old.number] = f"{', '.join(_changed_fields(before, new.job))} changed"
            self._redefined.add(new.job.id)
            return
        if not self._redefined.isdisjoint(parents):
            self._reasons[old.number] = MADE_AGAIN
            self._redefined.add(new.job.id)
            return
        query = "SELECT row FROM attempts WHERE seq = ?"
        found = self._db.execute(query, (old.current,)).fetchone()
        row = {} if found is None else row_from_json(found[0])
        changed = _changed_model(row, self._identity)
        if parents and not changed:
            # An earlier reading, which did not get as far as this job, has changed a parent.
            self._reasons[old.number] = "an image it starts from was made again"
            self._redefined.add(new.job.id)
            return
        self._reasons[old.number] = changed or _OTHER_PROMPTS
        if old.status == DONE:
            self._of_model.add(old.number)

    def _redraw(self) -> Redraw | None:
        if not self._of_model:
            return None
        reasons = Counter(self._reasons[number] for number in self._of_model)
        return Redraw(
            jobs=len(self._of_model), reasons=tuple(words for words, _ in reasons.most_common())
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

    def finish(self, root: Path, limit: int | None) -> Changes:
        """Marks the jobs that were not read, and those whose files are missing.

        Args:
            root: The run's folder.
            limit: After how many jobs the reading ended; jobs that it did not reach stay wanted.

        Raises:
            RunFolderError: The folder belongs to other manifests.
            StorageError: The folder cannot be read.
        """
        if self._jobs != limit:
            self._adopt()
        self._reading.finish(same=self._same, replaced=self._replaced)
        removed, unread = self._leave_out(limit)
        with storage_errors(root):
            restored = self._without_files(root)
            self._db.executemany(
                "UPDATE jobs SET status = ?, tries = 0, alone = 0, current = NULL WHERE number = ?",
                ((PENDING, number) for number in restored),
            )
            undropped = acceptance.draw_dropped(self._db)
            returned = self._take_back(root)
            descendants = chains.draw_again(self._db)
            acceptance.hold(self._db)
            chains.settle(self._db)
            if not tables.has_pending(self._db) and acceptance.release(self._db):
                chains.settle(self._db)
            self._drop_outdated_batches(root)
        self._of_model -= returned.keys()
        self._reasons.update(dict.fromkeys(restored, "a file is missing"))
        self._reasons.update(dict.fromkeys(undropped, _REMOVED))
        self._reasons.update(dict.fromkeys(descendants, MADE_AGAIN))
        is_new = self._is_other or self._number == 1
        if is_new or removed or restored or undropped or returned or descendants:
            tables.forget_log(self._db)
        groups = (self._changed - returned.keys(), set(restored), set(undropped), set(descendants))
        held = self._held() if any(groups) else set()
        changed, missing, dropped, following = (len(group - held) for group in groups)
        return Changes(
            jobs=self._jobs,
            added=self._added,
            changed=changed,
            removed=removed,
            unread=unread,
            restored=missing,
            returned=len(returned),
            redraw=self._redraw(),
            reasons=self._reasons,
            descendants=following,
            undropped=dropped,
            held=len(held & set().union(*groups)),
        )

    def _leave_out(self, limit: int | None) -> tuple[int, int]:
        """Marks jobs that are no longer in the manifests; returns how many, and how many may be."""
        if self._jobs == limit:
            query = "SELECT count(*) FROM jobs WHERE wanted = 1 AND seen <> ?"
            return 0, self._db.execute(query, (self._number,)).fetchone()[0]
        query = "UPDATE jobs SET wanted = 0 WHERE wanted = 1 AND seen <> ?"
        return self._db.execute(query, (self._number,)).rowcount, 0

    def _held(self) -> set[int]:
        """Returns the jobs that run only if they are needed."""
        query = "SELECT number FROM jobs WHERE seen = ? AND status = ?"
        return {number for (number,) in self._db.execute(query, (self._number, HELD))}

    def _adopt(self) -> None:
        """Gives jobs that an earlier version derived another id for their new id.

        Ids were once derived from the paths of input images, not from their bytes. A job that is
        new only by its name is the one of its key that is no longer in the manifests. Its files
        keep their names.
        """
        others = "SELECT 1 FROM jobs WHERE seen <> ? LIMIT 1"
        if not self._added or not self._db.execute(others, (self._number,)).fetchone():
            return
        pairs = self._db.execute(
            "SELECT new.number, new.id, old.number, old.id FROM jobs AS new JOIN jobs AS old"
            " ON old.key = new.key WHERE new.seen = ? AND new.attempts = 0 AND old.seen <> ?"
            " AND new.definition LIKE '%\"images\":[[%'",
            (self._number, self._number),
        ).fetchall()
        names: dict[str, str] = {}
        taken: set[str] = set()
        for new, new_id, old, old_id in pairs:
            is_derived = _DERIVED_ID.fullmatch(new_id) and _DERIVED_ID.fullmatch(old_id)
            if is_derived and new_id not in taken and old_id not in names:
                names[old_id] = new_id
                taken.add(new_id)
                tables.replace_job(self._db, old, by=new)
        self._added -= len(names)
        self._same += len(names)
        self._is_other |= bool(names)
        tables.rename_jobs(self._db, names)

    def _without_files(self, root: Path) -> list[int]:
        """Returns done jobs of which a file is missing."""
        folder = f"{root}/"
        rows = self._db.execute(
            "SELECT number, outputs FROM jobs WHERE seen = ? AND status = ?", (self._number, DONE)
        )
        return [
            number
            for number, outputs in rows
            if not all(is_file(folder + path) for path in json.loads(outputs))
        ]

    def _take_back(self, root: Path) -> dict[int, int]:
        """Makes jobs done again that are to be run and were done as they are; see `_returned`."""
        returned: dict[int, int] = {}
        # Each round is one generation of jobs that start from images of others.
        while found := self._returned(root):
            returned |= found
            self._db.executemany(
                "UPDATE jobs SET status = ?, current = ?, finish_reason = (SELECT"
                " json_extract(row, '$.finish_reason') FROM attempts WHERE seq = ?)"
                " WHERE number = ?",
                ((DONE, seq, seq, number) for number, seq in found.items()),
            )
        return returned

    def _returned(self, root: Path) -> dict[int, int]:
        """Returns jobs to be run whose last success was of their key, and left the files there are.

        Each comes with the number of that success among the attempts.

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
            return {}
        made: dict[str, tuple[int, list[tuple[str, str]]]] = {}
        attempts = self._db.execute(
            "SELECT seq, job_id, row FROM attempts"
            f" WHERE job_id IN (SELECT id FROM jobs WHERE {to_run}) ORDER BY seq",
            values,
        )
        for seq, job_id, text in attempts:
            row = row_from_json(text)
            if row["status"] == DONE:
                is_own = row["key"] == keys[job_id][1]
                made[job_id] = (seq, digests_of(row) if is_own else [])
        return {
            keys[job_id][0]: seq
            for job_id, (seq, files) in made.items()
            if files
            and not chains.is_outdated(self._db, keys[job_id][0])
            and all(sha256_of(root / path) == digest for path, digest in files)
        }

    def _drop_outdated_batches(self, root: Path) -> None:
        """Forgets started batches of which a job changed or is no longer wanted.

        A process that was killed between the files of such a batch and its commit left files that
        no row names, and that none may ever replace.
        """
        query = "SELECT key FROM jobs WHERE folded = ? AND wanted = 1 AND status = ?"
        for batch in tables.started_batches(self._db):
            for job_id, key in batch.members:
                folded = folded_id(job_id)
                is_same = self._db.execute(query, (folded, PENDING)).fetchone() == (key,)
                if not is_same or chains.waits(self._db, folded):
                    tables.add_stale(self._db, tables.leftovers(self._db, root, batch))
                    self._db.execute("DELETE FROM batches WHERE seq = ?", (batch.seq,))
                    break


def _changed_fields(before: Job, now: Job) -> list[str]:
    """Returns the names of what decides a job's pixels and is not as it was."""
    names = ("task", "prompt", "history", "seed", "think", "system_prompt", "input_max_pixels")
    changed = [name for name in names if getattr(before, name) != getattr(now, name)]
    if before.judged_by != now.judged_by:
        changed.append("function")
    inputs = [[(image.key, image.output) for image in job.images] for job in (before, now)]
    if inputs[0] != inputs[1]:
        changed.append("input images")
    if before.resolution != now.resolution:
        changed.append("size")
    old, new = stated(before.sampling), stated(now.sampling)
    return changed + [name for name in {**old, **new} if old.get(name) != new.get(name)]


_REMOVED = "its image was removed when it was rejected"
"""Why a job runs again whose image is wanted now."""
_OTHER_PROMPTS = "other system prompts or another version of sensebatch"
"""Why a job runs again of which nothing that the log has is another."""


def _changed_model(row: Mapping[str, Any], identity: ModelIdentity) -> str:
    """Returns what is not as it was of the model that drew a row; empty where all of it is."""
    now = {
        "checkpoint": identity.checkpoint,
        "lora": identity.lora,
        "dtype": identity.dtype,
        "precision": identity.precision,
    }
    changed = [name for name, value in now.items() if row and row[name] != value]
    words = []
    for name in changed:
        if name == "checkpoint":
            words.append(f"another checkpoint (drawn by {row['model'] or 'an unknown one'})")
        elif name == "lora":
            words.append("no LoRA" if identity.lora is None else "another LoRA")
        else:
            words.append(f"{name} {now[name] or 'auto'} instead of {row[name] or 'auto'}")
    return ", ".join(words)
