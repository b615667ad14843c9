"""What is done and what is not: the truth of a run, in SQLite, in the run's folder.

A job is done when its row here says so; its files are in place before that. Knows nothing of
images, engines or Parquet.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sensebatch.jobs import FinishReason, GroupKey, Job, ModelIdentity, folded_id, parents_of
from sensebatch.plan.batches import PlanEntry, plan_entry
from sensebatch.store import acceptance, chains, lanes, shards, tables
from sensebatch.store.acceptance import HeldJob, Judgement, Series, Verdict
from sensebatch.store.attempts import (
    BLOCKED,
    DONE,
    ELSEWHERE,
    FAILED,
    HELD,
    PENDING,
    Attempt,
    row_from_json,
)
from sensebatch.store.codec import group_from_json, job_from_json, job_to_json
from sensebatch.store.database import Database
from sensebatch.store.files import storage_errors
from sensebatch.store.ingest import Changes, Ingest
from sensebatch.store.manifests import ManifestFiles, Reading
from sensebatch.store.shards import Shard
from sensebatch.store.tables import WHOLE, Span, StartedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many of the manifest's jobs are in which state."""

    jobs: int
    pending: int
    """Not started."""
    started: int
    """In a batch that was begun and not committed: running, or interrupted."""
    done: int
    failed: int
    removed: int
    """Jobs of earlier manifests that the latest no longer has; not among `jobs`."""
    unread: int
    """Jobs that the latest reading ended before, because of its limit; not among `jobs`."""
    blocked: int = 0
    """Jobs that start from an image of one that failed; they wait for it to be tried again."""
    held: int = 0
    """Tries that are not needed so far, and what starts from them; not among `jobs`."""
    elsewhere: int = 0
    """Jobs that other shards run; not among `jobs`."""
    truncated: Mapping[str, int] = field(default_factory=dict)
    """Done jobs whose text is truncated, by their finish reason."""

    @property
    def remaining(self) -> int:
        """Jobs still to be run."""
        return self.pending + self.started


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredJob:
    """A job as the state knows it."""

    job: Job
    key: str
    attempts: int
    """Rows it has in the log."""
    tries: int
    """Attempts that count against `max_attempts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedJob:
    """A job that is no longer in the manifests, and whose files are still there."""

    number: int
    id: str
    definition: str
    row: str | None
    """The row of the log about its files; None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedJob:
    """A job with what became of it, as the state keeps them."""

    definition: str
    """See `codec.job_from_json`."""
    key: str
    status: str
    in_manifest: bool
    """As far as is known: after a repair all are, until the manifests are read."""
    attempts: int
    row: str | None
    """Its current row of the log, see `attempts.row_from_json`; None where there is none."""
    judgement: Judgement | None = None
    """What is known of a try that was asked about."""
    is_of_accepted: bool = True
    """Whether all tries that it starts from, itself or through others, are accepted."""
    is_of_dropped: bool = False
    """Whether it starts from an image that was removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """Where a job is."""

    number: int
    id: str
    status: str
    attempts: int
    has_files: bool
    """Whether it was done once, perhaps with another definition."""
    is_started: bool
    """Whether it is in a batch that was begun and not committed."""


class State:
    """The state database of a run's folder.

    Args:
        path: `state.db`; made where it does not exist.
        read_only: Reads beside the process that writes.
        as_copy: Works on a copy of an existing file, or on an empty one; nothing is written back.

    Raises:
        RunFolderError: The file is not a state database, or a newer version made it.
    """

    def __init__(self, path: Path, *, read_only: bool = False, as_copy: bool = False) -> None:
        self._db = Database(path, read_only=read_only, as_copy=as_copy)
        self.num_dropped = 0
        """Rejected images that this process has had removed."""
        if not read_only:
            with self._db.transaction() as db:
                db.execute("INSERT OR IGNORE INTO meta VALUES ('run', ?)", (uuid.uuid4().hex[:12],))

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    @property
    def run_id(self) -> str:
        """The folder's id: 12 hex digits, drawn when it was made."""
        with self._db.reading() as db:
            return tables.get_meta(db, "run") or ""

    @property
    def knows_manifests(self) -> bool:
        """Whether manifests were read since the state was made, or rebuilt by a repair."""
        with self._db.reading() as db:
            return tables.get_meta(db, "reading") is not None

    def next_session(self) -> int:
        """Returns a number for a process that works in the folder; the first is 1."""
        with self._db.transaction() as db:
            return tables.increment(db, "session")

    def ingest(
        self,
        jobs: Iterable[Job],
        identity: ModelIdentity,
        root: Path,
        *,
        limit: int | None = None,
        files: ManifestFiles | None = None,
        shard: Shard | None = None,
        approve: Callable[[Changes], None] = lambda _: None,
    ) -> Changes:
        """Makes `jobs` the run's manifest, in one transaction.

        Args:
            jobs: All jobs, in order; read once, one by one. Whatever it raises undoes all.
            identity: What the keys depend on besides the jobs.
            root: The run's folder, in which the files of done jobs are looked for.
            limit: The number of jobs after which `jobs` ends, even if the manifests have more. Jobs
                that it did not reach are neither removed nor run until they are read again; only a
                batch that was started with one that it did reach runs whole.
            files: What `jobs` reads, and nothing else; it is not asked if they are as they were.
                None where jobs have another source.
            shard: The shard that the folder is; None if it is none.
            approve: Is asked before anything is kept; whatever it raises undoes all.

        Raises:
            ManifestError: Two jobs have the same id, or ids that a disk which ignores case takes
                for the same.
            RunFolderError: The folder belongs to other manifests or to another shard, or the jobs
                are not those that the shard was planned with.
            StorageError: The folder cannot be read.
        """
        with self._db.transaction() as db:
            shards.require_shard(db, shard, root)
            reading = Reading(db, files, identity, root)
            ingest = Ingest(db, identity, reading)
            if reading.is_known():
                ingest.confirm()
            else:
                ingest.read(jobs)
            changes = ingest.finish(root, limit)
            shards.require_same_jobs(db, root)
            approve(changes)
            return changes

    def shard(self) -> Shard | None:
        """Returns which shard the folder is; None if it is none."""
        with self._db.reading() as db:
            return shards.shard_of(db)

    def is_claimed(self) -> bool:
        """Returns whether it is on record which batches are the shard's own."""
        with self._db.reading() as db:
            return shards.claimed(db) is not None

    def claim(
        self,
        batches: Sequence[Sequence[str]],
        owners: Iterable[int],
        *,
        cut: str,
        output: str,
    ) -> int:
        """Records which batches are the shard's own; returns how many; see `shards.claim`."""
        with self._db.transaction() as db:
            return shards.claim(db, batches, owners, cut=cut, output=output)

    def counts(self) -> Counts:
        """Returns the number of jobs in each state."""
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT wanted, seen = ?, status, count(*) FROM jobs GROUP BY 1, 2, 3",
                (tables.latest_reading(db),),
            ).fetchall()
            reasons = db.execute(
                "SELECT finish_reason, count(*) FROM jobs WHERE wanted = 1 AND seen = ?"
                " AND status = ? AND finish_reason IS NOT NULL GROUP BY 1 ORDER BY 1",
                (tables.latest_reading(db), DONE),
            ).fetchall()
            started = sum(
                tables.is_read(db, job_id)
                for batch in tables.started_batches(db)
                for job_id in batch.ids
            )
        wanted = {status: count for is_wanted, seen, status, count in rows if is_wanted and seen}
        elsewhere, held = wanted.pop(ELSEWHERE, 0), wanted.pop(HELD, 0)
        return Counts(
            jobs=sum(wanted.values()),
            pending=wanted.get(PENDING, 0) - started,
            started=started,
            done=wanted.get(DONE, 0),
            failed=wanted.get(FAILED, 0),
            removed=sum(count for is_wanted, _, _, count in rows if not is_wanted),
            unread=sum(count for is_wanted, seen, _, count in rows if is_wanted and not seen),
            blocked=wanted.get(BLOCKED, 0),
            held=held,
            elsewhere=elsewhere,
            truncated={
                reason: count for reason, count in reasons if FinishReason(reason).is_truncated
            },
        )

    def has_jobs(self) -> bool:
        """Returns whether the folder ever had a job."""
        with self._db.reading() as db:
            return db.execute("SELECT 1 FROM jobs LIMIT 1").fetchone() is not None

    def retry_failed(self) -> int:
        """Makes failed jobs pending again, with all their tries; returns how many."""
        with self._db.transaction() as db:
            number = db.execute(
                "UPDATE jobs SET status = ?, tries = 0, alone = 1 WHERE seen = ? AND status = ?",
                (PENDING, tables.latest_reading(db), FAILED),
            ).rowcount
            chains.settle(db)
            return number

    def settle_chains(self, span: Span = WHOLE) -> None:
        """Blocks jobs that start from images of failed ones, and lets others run again.

        If nothing else of a lane is to be run, every verdict of it is there, and those of its tries
        that are needed now may run.

        Args:
            span: The jobs of the lane.
        """
        with self._db.reading() as db:
            if not chains.has_any(db):
                return
        with self._db.transaction() as db:
            chains.settle(db)
            if not tables.has_pending(db, span) and acceptance.release(db, span):
                chains.settle(db)

    def drop_rejected(self, span: Span = WHOLE) -> list[str]:
        """Records that rejected images of some jobs are to be removed; returns their paths."""
        with self._db.reading() as db:
            if not acceptance.has_any(db):
                return []
        with self._db.transaction() as db:
            dropped = acceptance.drop(db, span)
        self.num_dropped += len(dropped)
        return list(itertools.chain(*dropped))

    def lanes(self, least: int) -> list[Span]:
        """Returns the jobs in one or two lanes that have nothing to do with each other.

        Args:
            least: Tries that must be open from the beginning in each of two.
        """
        with self._db.reading() as db:
            return lanes.lanes(db, least)

    def series(self) -> list[Series]:
        """Returns the series of tries that the manifests have, and how far they are."""
        with self._db.reading() as db:
            return list(acceptance.series(db))

    def verdicts(self) -> dict[str, Verdict]:
        """Returns what became of each try that was judged, by the job's id."""
        with self._db.reading() as db:
            found = acceptance.judgements(db)
        return {job_id: one.verdict for job_id, one in found.items() if one.verdict is not None}

    def held_jobs(self) -> list[HeldJob]:
        """Returns the jobs that wait for tries and are none themselves."""
        with self._db.reading() as db:
            return list(acceptance.held_jobs(db))

    def has_tries(self) -> bool:
        """Returns whether the folder has a series of tries."""
        with self._db.reading() as db:
            return acceptance.has_any(db)

    def has_chains(self) -> bool:
        """Returns whether jobs start from images of other jobs."""
        with self._db.reading() as db:
            return chains.has_any(db)

    def run_again(self, keys: Mapping[str, str | None], occasion: str) -> tuple[int, int]:
        """Makes jobs pending again that were done or given up, once for each occasion.

        Args:
            keys: Their ids, with the key that a job must have; None where any will do.
            occasion: What they run again for. A job that has been tried since the state first
                heard of it is left alone, so that the same command resumes the run.

        Returns:
            How many jobs run again, and how many of them were done.
        """
        name = f"again:{occasion}"
        query = (
            "SELECT number, key, status FROM jobs WHERE id = ? AND folded = ? AND wanted = 1"
            " AND seen = ? AND status IN (?, ?) AND current <= ?"
        )
        found: dict[int, str] = {}
        with self._db.transaction() as db:
            known = tables.get_meta(db, name)
            if known is None:
                (latest,) = db.execute("SELECT coalesce(max(seq), 0) FROM attempts").fetchone()
                known = str(latest)
                tables.set_meta(db, name, known)
            reading = tables.latest_reading(db)
            for job_id, key in keys.items():
                values = (job_id, folded_id(job_id), reading, DONE, FAILED, int(known))
                row = db.execute(query, values).fetchone()
                if row is not None and key in (None, row[1]):
                    found[row[0]] = row[2]
            db.executemany(
                "UPDATE jobs SET status = ?, tries = 0, current = NULL WHERE number = ?",
                ((PENDING, number) for number in found),
            )
            if found:
                chains.draw_again(db)
                chains.settle(db)
                tables.forget_log(db)
        return len(found), sum(status == DONE for status in found.values())

    def other_model(self, checkpoint: str, name: str) -> str | None:
        """Returns the name of a model that done jobs of the folder were made with.

        Args:
            checkpoint: The fingerprint of the model that does not count.
            name: What that model is called; another version of it does not count either.
        """
        query = (
            "SELECT json_extract(row, '$.model') FROM jobs JOIN attempts ON seq = current"
            " WHERE status = ? AND json_extract(row, '$.checkpoint') <> ?"
            " AND json_extract(row, '$.model') NOT IN ('', ?) LIMIT 1"
        )
        with self._db.reading() as db:
            found = db.execute(query, (DONE, checkpoint, name)).fetchone()
        return None if found is None else found[0]

    def progress(self) -> Iterator[JobProgress]:
        """Yields where each job of the latest reading is, in the order of the manifests."""
        with self._db.reading() as db:
            started = {job_id for batch in tables.started_batches(db) for job_id in batch.ids}
            rows = db.execute(
                "SELECT number, id, status, attempts, outputs <> '[]' FROM jobs"
                " WHERE wanted = 1 AND seen = ? AND status <> ? ORDER BY position",
                (tables.latest_reading(db), ELSEWHERE),
            )
            for number, job_id, status, attempts, has_files in rows:
                yield JobProgress(
                    number=number,
                    id=job_id,
                    status=status,
                    attempts=attempts,
                    has_files=bool(has_files),
                    is_started=job_id in started,
                )

    def entries(self, span: Span = WHOLE, *, with_started: bool = False) -> Iterator[PlanEntry]:
        """Yields what the plan needs of every job that is to be run and is in no started batch.

        Args:
            span: The jobs.
            with_started: Whether members of started batches count as well.
        """
        with self._db.reading() as db:
            started = {job_id for batch in tables.started_batches(db) for job_id in batch.ids}
            groups = {
                number: group_from_json(text)
                for number, text in db.execute("SELECT number, definition FROM groups")
            }
            level = "coalesce(json_extract(definition, '$.level'), 0)" if chains.has_any(db) else 0
            rows = db.execute(
                "SELECT id, group_number, max_images, prompt_tokens, text_tokens, alone,"
                f" {level} FROM jobs WHERE wanted = 1 AND status = ? AND seen = ?"
                " AND position BETWEEN ? AND ? ORDER BY position",
                (PENDING, tables.latest_reading(db), *span),
            )
            for job_id, number, max_images, prompt_tokens, text_tokens, alone, its_level in rows:
                if with_started or job_id not in started:
                    yield PlanEntry(
                        id=job_id,
                        group=groups[number],
                        max_images=max_images,
                        prompt_tokens=prompt_tokens,
                        text_tokens=text_tokens,
                        alone=bool(alone),
                        level=its_level,
                    )

    def groups_to_run(self) -> set[GroupKey]:
        """Returns the groups of all jobs that are to be run."""
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT definition FROM groups WHERE number IN (SELECT group_number FROM jobs"
                " WHERE wanted = 1 AND status = ? AND seen = ?)",
                (PENDING, tables.latest_reading(db)),
            )
            return {group_from_json(text) for (text,) in rows}

    def whole_manifest(self) -> Iterator[PlanEntry]:
        """Yields what the plan needs of every job, as if none had been tried."""
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT definition FROM jobs WHERE wanted = 1 AND seen = ? ORDER BY position",
                (tables.latest_reading(db),),
            )
            for (definition,) in rows:
                yield plan_entry(job_from_json(definition))

    def jobs(self, ids: Sequence[str]) -> list[StoredJob]:
        """Returns jobs by id, in the order asked for.

        Raises:
            KeyError: There is no such job.
        """
        found = []
        with self._db.reading() as db:
            for job_id in ids:
                row = db.execute(
                    "SELECT definition, key, attempts, tries FROM jobs WHERE folded = ?",
                    (folded_id(job_id),),
                ).fetchone()
                if row is None:
                    raise KeyError(job_id)
                job = chains.with_inputs(db, job_from_json(row[0]))
                found.append(StoredJob(job=job, key=row[1], attempts=row[2], tries=row[3]))
        return found

    def rows(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Returns the current rows of the log of those of some jobs that have one, by their ids."""
        query = "SELECT row FROM jobs JOIN attempts ON attempts.seq = current WHERE folded = ?"
        with self._db.reading() as db:
            found = ((one, db.execute(query, (folded_id(one),)).fetchone()) for one in ids)
            return {job_id: row_from_json(row[0]) for job_id, row in found if row}

    def described(self, *, removed: bool = False) -> Iterator[DescribedJob]:
        """Yields what the state knows of each job, in the order of the manifests.

        Args:
            removed: Whether jobs follow that are no longer in the manifests and were tried.

        Those that other shards run are left out.
        """
        with self._db.reading() as db:
            rows = db.execute(
                f"SELECT definition, key, status, {tables.LISTED} AS listed, attempts, row,"
                " outputs = '[]'"
                " FROM jobs LEFT JOIN attempts ON attempts.seq = current"
                f" WHERE status <> ? AND (listed{' OR current IS NOT NULL' if removed else ''})"
                " ORDER BY listed DESC, position, number",
                (ELSEWHERE,),
            )
            has_chains, judgements = chains.has_any(db), acceptance.judgements(db)
            # Jobs read so far that are tries and not accepted, or start from such a try.
            others: set[str] = set()
            dropped: set[str] = set()
            for definition, key, status, listed, attempts, row, is_empty in rows:
                judgement, is_of_accepted, is_of_dropped = None, True, False
                if has_chains:
                    # With the images that its parents made, as far as they are there.
                    job = chains.with_inputs(db, job_from_json(definition))
                    judgement = judgements.get(job.id)
                    is_of_accepted = others.isdisjoint(parents_of(job))
                    is_of_dropped = not dropped.isdisjoint(parents_of(job))
                    is_try = job.attempt_at is not None
                    is_other = is_try and not (judgement and judgement.verdict is Verdict.ACCEPTED)
                    if is_other or not is_of_accepted:
                        others.add(job.id)
                    if is_empty and status == DONE:
                        dropped.add(job.id)
                    definition = job_to_json(job)
                yield DescribedJob(
                    definition=definition,
                    key=key,
                    status=status,
                    in_manifest=bool(listed),
                    attempts=attempts,
                    row=row,
                    judgement=judgement,
                    is_of_accepted=is_of_accepted,
                    is_of_dropped=is_of_dropped,
                )

    def keys_of(self, ids: Iterable[str]) -> dict[str, str]:
        """Returns the keys of those of some jobs that there are, by their ids."""
        query = "SELECT key FROM jobs WHERE id = ? AND folded = ?"
        with self._db.reading() as db:
            found = ((job_id, db.execute(query, (job_id, folded_id(job_id)))) for job_id in ids)
            return {job_id: row[0] for job_id, rows in found if (row := rows.fetchone())}

    def names_in(self, field: str) -> list[str]:
        """Returns the names that a mapping of the jobs' definitions has, in no job twice.

        Args:
            field: `matrix` or `metadata`.
        """
        query = "SELECT DISTINCT j.key FROM jobs, json_each(definition, ?) AS j ORDER BY j.key"
        with self._db.reading() as db:
            return [name for (name,) in db.execute(query, (f"$.{field}",))]

    def finished(self) -> Iterator[tuple[str, str, str]]:
        """Yields (definition, key, row of the log) of each job that is done, in manifest order.

        The row is that of its last success, which made the files that are there. Rejected images
        that were removed are left out.
        """
        with self._db.reading() as db:
            yield from db.execute(
                "SELECT definition, key, row FROM jobs JOIN attempts ON attempts.seq = current"
                " WHERE wanted = 1 AND status = ? AND seen = ? AND outputs <> '[]'"
                " ORDER BY position",
                (DONE, tables.latest_reading(db)),
            )

    def made(self) -> Iterator[tuple[str, str]]:
        """Yields (id, row of the log) of the last success of each job that has files."""
        with self._db.reading() as db:
            yield from db.execute(
                "WITH last AS (SELECT job_id, max(seq) AS seq FROM attempts"
                " WHERE json_extract(row, '$.status') = ? GROUP BY job_id)"
                " SELECT id, row FROM jobs JOIN last ON last.job_id = jobs.id"
                " JOIN attempts ON attempts.seq = last.seq"
                " WHERE outputs <> '[]' ORDER BY jobs.number",
                (DONE,),
            )

    def removed(self) -> Iterator[RemovedJob]:
        """Yields the jobs that are no longer in the manifests and have files."""
        query = (
            "SELECT number, id, definition, (SELECT row FROM attempts WHERE job_id = jobs.id"
            " AND json_extract(row, '$.status') = ? ORDER BY seq DESC LIMIT 1)"
            f" FROM jobs WHERE NOT {tables.LISTED} AND outputs <> '[]' ORDER BY number"
        )
        with self._db.reading() as db:
            for number, job_id, definition, row in db.execute(query, (DONE,)):
                yield RemovedJob(number=number, id=job_id, definition=definition, row=row)

    def outputs(self) -> set[str]:
        """Returns the files of all jobs that are in the manifests, as paths in the folder."""
        query = f"SELECT outputs FROM jobs WHERE {tables.LISTED}"
        with self._db.reading() as db:
            return {path for (text,) in db.execute(query) for path in json.loads(text)}

    def input_digests(self) -> set[str]:
        """Returns the SHA-256 of each input image of the jobs that are in the manifests."""
        query = (
            "SELECT DISTINCT json_extract(image.value, '$[2]') FROM jobs,"
            f" json_each(definition, '$.images') AS image WHERE {tables.LISTED}"
        )
        with self._db.reading() as db:
            return {digest for (digest,) in db.execute(query)}

    def is_read_last(self, manifest: str) -> bool:
        """Returns whether the latest reading had a manifest among its files."""
        with self._db.reading() as db:
            query = "SELECT 1 FROM inputs WHERE path = ?"
            return db.execute(query, (manifest,)).fetchone() is not None

    def forget_outputs(self, numbers: Iterable[int], paths: Iterable[str]) -> None:
        """Records that jobs no longer have files, and which of them are to be removed.

        Args:
            numbers: The jobs; should they return to the manifests, they are run again.
            paths: The files, as paths in the folder.
        """
        with self._db.transaction() as db:
            db.executemany(
                "UPDATE jobs SET outputs = '[]', status = ?, tries = 0, current = NULL,"
                " finish_reason = NULL WHERE number = ?",
                ((PENDING, number) for number in numbers),
            )
            tables.add_stale(db, paths)
            tables.forget_log(db)

    def unhashed(self) -> Iterator[tuple[int, str]]:
        """Yields (number, row of the log) of current successes without perceptual hashes."""
        with self._db.reading() as db:
            yield from db.execute(
                "SELECT seq, row FROM jobs JOIN attempts ON seq = current WHERE status = ?"
                " AND outputs <> '[]' AND coalesce(json_array_length(row, '$.image_phash'), 0)"
                " < json_array_length(row, '$.image_paths') ORDER BY seq",
                (DONE,),
            )

    def add_hashes(self, hashes: Iterable[tuple[int, Sequence[str]]]) -> None:
        """Adds perceptual hashes to rows of the log, by their numbers, and has it written."""
        with self._db.transaction() as db:
            db.executemany(
                "UPDATE attempts SET row = json_set(row, '$.image_phash', json(?)) WHERE seq = ?",
                ((json.dumps(list(own)), seq) for seq, own in hashes),
            )
            tables.forget_log(db, parts=True)

    def failed(self) -> Iterator[tuple[str, str]]:
        """Yields (id, row of the log) of each job that failed for good, in manifest order."""
        with self._db.reading() as db:
            yield from db.execute(
                "SELECT id, row FROM jobs JOIN attempts ON attempts.seq = current"
                " WHERE wanted = 1 AND status = ? AND seen = ? ORDER BY position",
                (FAILED, tables.latest_reading(db)),
            )

    def started_batches(self) -> list[StartedBatch]:
        """Returns the batches to continue with, in the order they were recorded.

        They are on record and not committed, and at least one of their jobs is to be run.
        """
        with self._db.reading() as db:
            return [
                batch
                for batch in tables.started_batches(db)
                if any(tables.is_read(db, job_id) for job_id in batch.ids)
            ]

    def drop_batches(self, seqs: Iterable[int]) -> None:
        """Forgets that batches were started; their jobs are planned again."""
        with self._db.transaction() as db:
            db.executemany("DELETE FROM batches WHERE seq = ?", ((seq,) for seq in seqs))

    def begin(
        self,
        members: Sequence[tuple[str, str]],
        *,
        replacing: int | None = None,
        failed: Sequence[Attempt] = (),
        max_attempts: int = 1,
        starts: int = 1,
    ) -> int:
        """Records the composition of a batch that starts, and returns its number.

        In the same transaction the jobs that cannot run with the others get their failed
        attempts: were they apart, a kill between them would change later batches.

        Args:
            members: (id, key) of each job, in the batch's order; may be empty beside failures.
            replacing: The number of the batch this one takes the place of, with its starts.
            failed: Attempts of jobs that failed before the batch began.
            max_attempts: Tries after which a job counts as failed.
            starts: Starts that count against it; none where it is handed to another process, whose
                death is noticed.
        """
        is_suspect = False
        with self._db.transaction() as db:
            if replacing is not None:
                starts, is_suspect = db.execute(
                    "DELETE FROM batches WHERE seq = ? RETURNING starts, suspect", (replacing,)
                ).fetchone()
            tables.record_attempts(db, failed, max_attempts)
            if not members:
                return 0
            return tables.insert_batch(db, members, starts=starts, is_suspect=bool(is_suspect))

    def start(self, seq: int, rounds: int) -> int:
        """Counts that a batch on record starts again, and returns how often it was in a row.

        Args:
            seq: The batch's number.
            rounds: Rounds of images that are kept of it. If there are more of them than at its last
                start, the count begins again.
        """
        with self._db.transaction() as db:
            row = db.execute(
                "UPDATE batches SET rounds = ?,"
                " starts = CASE WHEN ? > rounds THEN 1 ELSE starts + 1 END WHERE seq = ?"
                " RETURNING starts",
                (rounds, rounds, seq),
            ).fetchone()
        return row[0]

    def forgive(self, seq: int) -> None:
        """Takes back that a batch was started: what ends the process now is not its fault."""
        with self._db.transaction() as db:
            db.execute("UPDATE batches SET starts = max(starts - 1, 0) WHERE seq = ?", (seq,))

    def write_as(self, extension: str, root: Path) -> None:
        """Has started batches write images of this extension, and what they wrote removed.

        Args:
            extension: Of the images that this process writes.
            root: The run's folder.

        Raises:
            StorageError: The folder cannot be read.
        """
        with self._db.transaction() as db, storage_errors(root):
            if tables.get_meta(db, tables.EXTENSION) == extension:
                return
            for batch in tables.started_batches(db):
                tables.add_stale(db, tables.leftovers(db, root, batch))
            tables.set_meta(db, tables.EXTENSION, extension)

    def split(
        self, seq: int, parts: Sequence[Sequence[tuple[str, str]]], *, is_suspect: bool = False
    ) -> list[int]:
        """Replaces a batch on record by smaller ones and returns their numbers.

        Args:
            seq: The batch's number.
            parts: (id, key) of each job of each of the smaller ones.
            is_suspect: Whether processes died of the batch.
        """
        with self._db.transaction() as db:
            db.execute("DELETE FROM batches WHERE seq = ?", (seq,))
            return [
                tables.insert_batch(db, members, starts=0, is_suspect=is_suspect)
                for members in parts
            ]

    def commit(self, seq: int, attempts: Sequence[Attempt], *, max_attempts: int) -> list[str]:
        """Records what became of a whole batch; this is the moment its jobs are done.

        Returns:
            Paths in the run's folder of files that the jobs no longer have, now to be removed.
        """
        with self._db.transaction() as db:
            stale = tables.record_attempts(db, attempts, max_attempts)
            db.execute("DELETE FROM batches WHERE seq = ?", (seq,))
        return stale

    def stale_files(self) -> list[str]:
        """Returns files that were replaced by a commit and may still be there."""
        with self._db.reading() as db:
            return [path for (path,) in db.execute("SELECT path FROM stale ORDER BY path")]

    def forget_stale(self, paths: Iterable[str]) -> None:
        """Records that stale files were removed."""
        with self._db.transaction() as db:
            db.executemany("DELETE FROM stale WHERE path = ?", ((path,) for path in paths))

    def needs_kept_images(self, seq: int, ids: Iterable[str]) -> bool:
        """Returns whether a batch is under way, or one of the jobs it had is still to be run."""
        with self._db.reading() as db:
            if db.execute("SELECT 1 FROM batches WHERE seq = ?", (seq,)).fetchone():
                return True
            query = "SELECT 1 FROM jobs WHERE folded = ? AND wanted = 1 AND status = ?"
            return any(db.execute(query, (folded_id(job_id), PENDING)).fetchone() for job_id in ids)

    def is_to_run(self, job_id: str, key: str) -> bool:
        """Returns whether a job is still to be run, and has this key."""
        query = "SELECT 1 FROM jobs WHERE folded = ? AND key = ? AND wanted = 1 AND status = ?"
        with self._db.reading() as db:
            row = db.execute(query, (folded_id(job_id), key, PENDING)).fetchone()
        return row is not None

    def log_digest(self, name: str) -> str | None:
        """Returns the SHA-256 that a file of the log was written with."""
        with self._db.reading() as db:
            return tables.get_meta(db, name)

    def set_log_digest(self, name: str, digest: str) -> None:
        """Records the SHA-256 of a file of the log that was just written."""
        with self._db.transaction() as db:
            tables.set_meta(db, name, digest)

    def marks(self) -> list[tuple[bool, bool]]:
        """Returns, for each attempt, whether it is its job's current one, and its job listed."""
        with self._db.reading() as db:
            rows = db.execute(
                f"SELECT jobs.current IS attempts.seq, coalesce({tables.LISTED}, 0)"
                " FROM attempts LEFT JOIN jobs ON jobs.id = attempts.job_id ORDER BY attempts.seq"
            )
            return [(bool(is_current), bool(is_wanted)) for is_current, is_wanted in rows]

    def num_attempts(self) -> int:
        """Returns how many rows the log has."""
        with self._db.reading() as db:
            return db.execute("SELECT coalesce(max(seq), 0) FROM attempts").fetchone()[0]

    def attempt_rows(self, first: int, last: int) -> list[str]:
        """Returns the attempts `first` to `last`, counted from 1, both included, as JSON."""
        with self._db.reading() as db:
            rows = db.execute(
                "SELECT row FROM attempts WHERE seq BETWEEN ? AND ? ORDER BY seq", (first, last)
            )
            return [row for (row,) in rows]
