"""Rebuilds a state database that was lost or damaged, from the log and the images.

What the log says is taken as it is, if the files are still those it names. Images without a row are
taken by the metadata in them. Nothing is deleted: the former state is kept, and so is every file
that no job is known for.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensebatch.config import default_config
from sensebatch.declarations import restored, stated
from sensebatch.errors import RunFolderError
from sensebatch.jobs import Job, Sampling, Source, batch_id, folded_id, group_key
from sensebatch.resolutions import Resolution
from sensebatch.store import tables
from sensebatch.store.attempts import (
    DONE,
    FAILED,
    PENDING,
    Attempt,
    attempt_to_json,
    digests_of,
    row_from_json,
    row_to_json,
)
from sensebatch.store.codec import job_to_json
from sensebatch.store.database import Database
from sensebatch.store.files import sha256_of, storage_errors, sync_folders
from sensebatch.store.kept import KeptImages
from sensebatch.store.log import Log
from sensebatch.store.rows import SAMPLING_COLUMNS
from sensebatch.store.run_dir import RunDir, read_settings
from sensebatch.store.salvage import RUN, FoundJob, OldState, found_jobs, log_files
from sensebatch.store.shards import SHARD
from sensebatch.store.state import State
from sensebatch.store.state_dir import ENDINGS, require_found
from sensebatch.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What a new state has, and what could not be saved."""

    is_rebuilt: bool
    """False if nothing was damaged; the folder is then as it was."""
    rows: int
    """Rows of the log."""
    done: int
    """Jobs whose files are those that the log names."""
    restored: int
    """Jobs without a row whose images say what they are; what they cost is not known."""
    failed: int
    to_run: tuple[str, ...]
    """Jobs that were done, and whose files are missing or have changed since."""
    batches: int
    """Interrupted batches that continue in the composition they were begun in."""
    problems: tuple[str, ...]
    """What could not be read; rows that were there alone are lost."""
    unknown: tuple[str, ...]
    """Images and texts that no job is known for."""
    former: str | None
    """What the former state is called now; None where there was none."""


def repair(root: Path, *, is_forced: bool = False, state_dir: Path | None = None) -> Repaired:
    """Rebuilds the state of a run's folder; the next run continues with it.

    Args:
        root: The folder.
        is_forced: Whether the state is rebuilt even if nothing is damaged.
        state_dir: Where the state is to be if it is lost and was not in the folder; see
            `state_dir.place_state`.

    Raises:
        RunFolderError: Another process works in the folder, a newer version made it, or there is
            nothing to rebuild from.
        StorageError: The file system failed; the former state is still there.
    """
    run_dir = RunDir(root)
    if not run_dir.has_outputs():
        raise RunFolderError(f"{root}: expected a run's folder, found neither images nor a log")
    with run_dir.locked(needs_state=False), storage_errors(root):
        if state_dir is not None:
            run_dir.place_state(state_dir, is_lost=True)
        else:
            require_found(root)
        run_dir.settle_state()
        path = run_dir.state.with_name(".state.db.repaired")
        _remove(path)
        try:
            with (
                tempfile.TemporaryDirectory(prefix="sensebatch-") as folder,
                closing(OldState(run_dir.state, Path(folder))) as old,
                closing(Database(path)) as database,
                database.transaction() as db,
            ):
                rebuild = _Rebuild(run_dir, old, db)
                rebuild.add_rows()
                rebuild.settle_jobs()
                rebuild.restore_jobs()
                rebuild.restore_batches()
                rebuild.require_any()
            if not (is_forced or rebuild.is_needed()):
                return rebuild.result(None, is_rebuilt=False)
            former = _put_in_place(run_dir, path, is_log_damaged=rebuild.is_log_damaged)
        finally:
            _remove(path)
        with closing(State(run_dir.state)) as state:
            Log(run_dir, state).write()
    return rebuild.result(former, is_rebuilt=True)


class _Rebuild:
    """Brings what is left of a run into an empty state, in one transaction."""

    def __init__(self, run_dir: RunDir, old: OldState, db: sqlite3.Connection) -> None:
        self._run_dir = run_dir
        self._root = run_dir.root
        self._old = old
        self._db = db
        self._files, self._problems = log_files(run_dir)
        self.is_log_damaged = bool(self._problems) and run_dir.log.exists()
        self._num_rows = self._num_old_rows = self._done = self._failed = self._num_batches = 0
        self._claimed: set[str] = set()
        self._to_run: list[str] = []
        self._restored: list[str] = []
        self._unknown: list[str] = []

    def is_needed(self) -> bool:
        """Whether the former state is damaged, or lacks something that the folder has."""
        is_behind = self._num_rows > self._num_old_rows
        lost = [*self._old.problems, *self._problems, *self._to_run]
        return is_behind or bool(lost)

    def result(self, former: Path | None, *, is_rebuilt: bool) -> Repaired:
        """Returns what came of it."""
        return Repaired(
            is_rebuilt=is_rebuilt,
            rows=self._num_rows,
            done=self._done,
            restored=len(self._restored),
            failed=self._failed,
            to_run=tuple(job_id for job_id in self._to_run if job_id not in self._restored),
            batches=self._num_batches,
            problems=(*self._old.problems, *self._problems),
            unknown=tuple(self._unknown),
            former=None if former is None else former.name,
        )

    def add_rows(self) -> None:
        """Adds the rows of the former state, then those that only the log has."""
        for row in self._old.rows():
            self._add_row(row)
        self._num_old_rows = self._num_rows
        run = self._add_meta()
        for file in self._files:
            if file.run in (None, run):
                for number, row in file.rows():
                    if number > self._num_rows:
                        self._add_row(row)
        query = "SELECT max(json_extract(row, '$.session')) FROM attempts"
        (session,) = self._db.execute(query).fetchone()
        tables.set_meta(self._db, "session", str(session or 0))

    def _add_meta(self) -> str:
        """Adds what is known of the folder; returns its id."""
        meta = self._old.meta()
        if not self._num_rows:
            # A run that was refused has given the empty state an id of its own.
            meta.pop(RUN, None)
        stated = (file.run for file in self._files if file.run)
        run = meta.setdefault(RUN, next(stated, uuid.uuid4().hex[:12]))
        if shard := read_settings(self._run_dir.settings).get(SHARD):
            # The next run decides again which batches are its own, and alike.
            meta.setdefault(SHARD, str(shard))
        for name, value in meta.items():
            tables.set_meta(self._db, name, value)
        return run

    def settle_jobs(self) -> None:
        """Makes jobs done whose latest success left the files that are there."""
        attempts = self._db.execute(
            "SELECT job_id, count(*), max(seq),"
            " max(CASE WHEN json_extract(row, '$.status') = ? THEN seq END)"
            " FROM attempts GROUP BY job_id ORDER BY max(seq)",
            (DONE,),
        ).fetchall()
        for _, count, last, success in attempts:
            query = "SELECT row FROM attempts WHERE seq = ?"
            (text,) = self._db.execute(query, (success or last,)).fetchone()
            row = row_from_json(text)
            files = digests_of(row)
            if success is None:
                self._failed += 1
                self._insert_job(row, FAILED, count, last)
            elif row.get("dropped") or all(
                sha256_of(self._root / name) == digest for name, digest in files
            ):
                self._done += 1
                self._claimed.update(name for name, _ in files)
                self._insert_job(row, DONE, count, success)
            else:
                self._to_run.append(row["job_id"])
                self._insert_job(row, PENDING, count)

    def restore_jobs(self) -> None:
        """Makes jobs done that no row has, and whose images say what they are."""
        found, self._unknown = found_jobs(self._root, self._claimed)
        session = tables.increment(self._db, "session") if found else 0
        for one in found:
            query = "SELECT number, status, attempts FROM jobs WHERE folded = ?"
            job_id = one.metadata["id"]
            number, status, attempts = self._db.execute(query, (folded_id(job_id),)).fetchone() or (
                None,
                PENDING,
                0,
            )
            if status == DONE:
                self._unknown += [*one.image_paths, *filter(None, [one.text_path])]
                continue
            if number is not None:
                self._db.execute("DELETE FROM jobs WHERE number = ?", (number,))
                self._failed -= status == FAILED
            row = self._row(one, session, attempts + 1)
            self._add_row(row)
            self._insert_job(row, DONE, attempts + 1, self._num_rows)
            self._restored.append(job_id)

    def restore_batches(self) -> None:
        """Has interrupted batches continue as they were begun, as far as that is known."""
        kept = dict(KeptImages(self._run_dir.kept_images).compositions())
        for seq, members in sorted({**kept, **self._old.batches()}.items()):
            tables.insert_batch(self._db, members, starts=0, seq=seq)
            if self._is_closed(members):
                # Inserted all the same: the next batch must not get the number of a folder.
                self._db.execute("DELETE FROM batches WHERE seq = ?", (seq,))
        self._num_batches = len(tables.started_batches(self._db))

    def require_any(self) -> None:
        """Refuses to put an empty state in the place of the former one.

        Raises:
            RunFolderError: Nothing of the run could be saved.
        """
        if not self._num_rows:
            reasons = "; ".join([*self._old.problems, *self._problems])
            raise RunFolderError(
                f"{self._root}: nothing can be rebuilt: no row could be read ({reasons}), and no "
                "image says what it is. Move the images elsewhere to draw them again in this folder"
            )

    def _is_closed(self, members: Sequence[tuple[str, str]]) -> bool:
        """Whether a job of a batch is done or failed: a batch is committed as a whole."""
        query = "SELECT 1 FROM jobs WHERE folded = ? AND key = ? AND status <> ?"
        return not members or any(
            self._db.execute(query, (folded_id(job_id), key, PENDING)).fetchone()
            for job_id, key in members
        )

    def _insert_job(
        self, row: Mapping[str, Any], status: str, attempts: int, current: int | None = None
    ) -> None:
        job = _job_of(row)
        number = tables.insert_job(
            self._db,
            job,
            group_number=tables.group_number(self._db, group_key(job)),
            key=row["key"],
            definition=job_to_json(job),
            position=0,
            seen=0,
        )
        outputs = json.dumps([] if row.get("dropped") else [name for name, _ in digests_of(row)])
        self._db.execute(
            "UPDATE jobs SET status = ?, attempts = ?, outputs = ?, current = ?,"
            " finish_reason = ? WHERE number = ?",
            (status, attempts, outputs, current, row.get("finish_reason"), number),
        )

    def _add_row(self, row: Mapping[str, Any]) -> None:
        self._num_rows += 1
        self._db.execute(
            "INSERT INTO attempts (job_id, row) VALUES (?, ?)", (row["job_id"], row_to_json(row))
        )

    def _row(self, found: FoundJob, session: int, attempt: int) -> dict[str, Any]:
        """Returns a row of the log about images without one: what they cost is not known."""
        paths, text_path = found.image_paths, found.text_path
        run = tables.get_meta(self._db, RUN)
        assert run is not None
        made = Attempt(
            **_said_columns(found.metadata, num_images=len(paths)),
            run=run,
            session=session,
            worker=None,
            node=None,
            status=DONE,
            attempt=attempt,
            queue_s=0.0,
            load_s=0.0,
            peak_rss_bytes=0,
            load_peak_allocated_bytes=0,
            load_peak_reserved_bytes=0,
            load_peak_rss_bytes=0,
            vram_mode="",
            budget_bytes=None,
            attn_backend="",
            device="",
            torch_version="",
            model="",
            image_paths=paths,
            image_sha256=tuple(sha256_of(self._root / name) or "" for name in paths),
            text_path=text_path,
            text_sha256=None if text_path is None else sha256_of(self._root / text_path),
            started_at=found.written_at,
            finished_at=found.written_at,
            source_file="",
            source_row="",
            metadata="{}",
        )
        return row_from_json(attempt_to_json(made))


def _said_columns(said: Mapping[str, Any], *, num_images: int) -> dict[str, Any]:
    """Returns the columns that follow from the metadata in an image.

    The images count as kept: no speed is measured by them.
    """
    size = Resolution(height=said["height"], width=said["width"])
    return {
        "job_id": said["id"],
        "key": said["key"],
        "task": said["task"],
        "prompt": said["prompt"],
        "seed": said["seed"],
        "width": size.width,
        "height": size.height,
        **{name: said["sampling"].get(name) for name in SAMPLING_COLUMNS},
        "think": said["think"],
        "num_input_images": len(said.get("input_sha256", ())),
        "num_images": num_images,
        "num_kept_images": num_images,
        "image_tokens": num_images * size.image_tokens,
        "batch_id": batch_id((said["key"],)),
        "batch_size": 1,
        "dtype": said.get("dtype", ""),
        "precision": said.get("precision"),
        "checkpoint": said.get("checkpoint", ""),
        "lora": said.get("lora"),
        "system_prompt_source": "job" if said.get("system_prompt") else "",
    }


def _job_of(row: Mapping[str, Any]) -> Job:
    """Returns the job of a row, as far as the row has it; the next manifest has the rest."""
    task = Task(row["task"])
    sampling = stated(default_config().tasks[task].sampling)
    given = {name: row[name] for name in SAMPLING_COLUMNS if row.get(name) is not None}
    is_sized = row["width"] is not None
    return Job(
        id=row["job_id"],
        task=task,
        prompt=row["prompt"],
        resolution=Resolution(height=row["height"], width=row["width"]) if is_sized else None,
        seed=row["seed"],
        think=row["think"],
        sampling=restored(Sampling, {**sampling, **given}),
        metadata=json.loads(row["metadata"]),
        matrix=json.loads(row.get("matrix") or "{}"),
        source=Source(file=row["source_file"], row=row["source_row"]),
    )


def _put_in_place(run_dir: RunDir, new: Path, *, is_log_damaged: bool) -> Path | None:
    """Makes a file the folder's state; returns what the former one is called now."""
    if is_log_damaged:
        _set_aside(run_dir.log)
    former = _set_aside(run_dir.state) if run_dir.state.exists() else None
    os.replace(new, run_dir.state)  # noqa: PTH105, as everywhere in the store
    sync_folders([run_dir.state], run_dir.state.parent)
    return former


def _set_aside(path: Path) -> Path:
    """Gives a file, and what SQLite has beside it, a name at which it can be looked into."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not aside.exists():
            break
    os.replace(path, aside)  # noqa: PTH105, as everywhere in the store
    for ending in ENDINGS[1:]:
        with suppress(FileNotFoundError):
            os.replace(f"{path}{ending}", f"{aside}{ending}")  # noqa: PTH105
    return aside


def _remove(path: Path) -> None:
    for ending in ENDINGS:
        Path(f"{path}{ending}").unlink(missing_ok=True)
