"""Joins the folders of shards into one, which then is that of a run of the whole manifest.

Files are in place before the rows that name them, and rows are committed in order together with how
far the merge is, so a merge that is killed at any moment continues with the same command. The
folders of the shards are only read. Files are linked where the file system can, and else copied.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sensebatch.errors import RunFolderError
from sensebatch.jobs import folded_id
from sensebatch.store import tables
from sensebatch.store.attempts import PENDING, row_from_json, row_to_json
from sensebatch.store.database import Database
from sensebatch.store.files import atomic_file, storage_errors, sync_folders, write_atomic
from sensebatch.store.log import Log
from sensebatch.store.manifests import MANIFESTS
from sensebatch.store.run_dir import RunDir, read_settings
from sensebatch.store.shards import SHARD, Claimed, Shard, claimed, shard_of
from sensebatch.store.state import Counts, State
from sensebatch.units import counted

_MERGE = "merge"
"""Name in `meta`: the shards that the folder is of, as JSON."""
_CHUNK = 200
"""Rows of the log that are joined in one transaction."""
_OWN = frozenset({"number", "seen", "group_number"})
"""Columns of a job that each folder has values of its own for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge came to."""

    counts: Counts
    """Jobs of the joined folder."""
    shards: int
    """How many there are."""
    missing: tuple[int, ...]
    """Numbers of shards that were not among the folders, now or before."""
    unfinished: Mapping[int, int]
    """Jobs that shards still had to run, by their numbers."""
    missing_files: tuple[str, ...]
    """Files that a job is done with and that its shard's folder lacks."""


@dataclass
class _Progress:
    """How far a shard has been joined; kept in the state."""

    run: str
    """Id of the shard's folder."""
    seq: int = 0
    """The last row of its log that was joined."""
    sessions: dict[str, int] = field(default_factory=dict)
    """Its sessions, and what they are called in the joined folder."""
    batches: list[int] = field(default_factory=list)
    """Its interrupted batches, by their numbers in the joined folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The folder of a shard, open to be read."""

    run_dir: RunDir
    db: sqlite3.Connection
    shard: Shard
    plan: Claimed

    @property
    def root(self) -> Path:
        return self.run_dir.root


def merge(
    folders: Sequence[Path],
    root: Path,
    say: Callable[[str], None] = lambda _: None,
    *,
    state_dir: Path | None = None,
) -> Merged:
    """Joins the folders of shards; returns what the joined folder has.

    Args:
        folders: Of shards of one manifest, in any order; some may be missing or unfinished.
        root: The joined folder: a new one, or that of an earlier merge of the same shards.
        say: Takes a line about each shard.
        state_dir: See `store.open_store`.

    Raises:
        RunFolderError: The folders do not belong together, a process works in one of them, or
            there is another run in `root`; nothing was changed.
        StorageError: The file system failed; the same merge continues.
    """
    places = [folder.resolve() for folder in folders]
    if root.resolve() in places:
        raise RunFolderError(f"{root}: expected another folder than those of the shards")
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise RunFolderError(f"{folder}: expected each folder once, found it more than once")
    with ExitStack() as stack:
        sources = [_open(folder, stack) for folder in folders]
        sources.sort(key=lambda source: source.shard.number)
        _require_agreement(sources)
        run_dir = RunDir(root)
        stack.enter_context(run_dir.locked(needs_state=state_dir is None))
        if state_dir is not None:
            run_dir.place_state(state_dir)
            run_dir.require_state_or_nothing()
        run_dir.settle_state()
        with closing(Database(run_dir.state)) as database, storage_errors(root):
            joining = _Merge(run_dir, database, sources)
            joining.begin()
            for source in sources:
                say(f"{source.shard.words}: {source.root}")
                joining.add(source)
            merged = joining.missing()
        joining.write_texts()
        with closing(State(run_dir.state)) as state:
            Log(run_dir, state).write()
            counts = state.counts()
    return Merged(
        counts=counts,
        shards=sources[0].shard.count,
        missing=merged,
        unfinished=joining.unfinished,
        missing_files=tuple(joining.missing_files),
    )


def _open(folder: Path, stack: ExitStack) -> _Source:
    """Opens the folder of a shard, and keeps others from working in it as far as that can be.

    Raises:
        RunFolderError: It is not a shard's, or a process works in it.
    """
    run_dir = RunDir(folder)
    run_dir.require_state()
    stack.enter_context(run_dir.undisturbed())
    database = stack.enter_context(closing(Database(run_dir.state, read_only=True)))
    db = stack.enter_context(database.reading())
    shard, plan = shard_of(db), claimed(db)
    if shard is None:
        raise RunFolderError(
            f"{folder}: expected the folder of a shard, found that of a run without --shard"
        )
    if plan is None:
        raise RunFolderError(
            f"{folder}: expected a shard that has begun, found {shard.words} before its first "
            "batch; run it, or leave its folder out"
        )
    return _Source(run_dir=run_dir, db=db, shard=shard, plan=plan)


def _require_agreement(sources: Sequence[_Source]) -> None:
    """Refuses folders that are not parts of one run.

    Raises:
        RunFolderError: Names two folders, and what differs.
    """
    first = sources[0]
    for before, source in itertools.pairwise(sources):
        where = f"{first.root} and {source.root}"
        if source.shard.count != first.shard.count:
            raise RunFolderError(
                f"{where}: expected shards of one division, found {first.shard.words} and "
                f"{source.shard.words}"
            )
        if source.shard == before.shard:
            raise RunFolderError(
                f"{before.root} and {source.root}: expected each shard once, found "
                f"{source.shard.words} in both"
            )
        if source.plan.jobs != first.plan.jobs:
            raise RunFolderError(
                f"{where}: expected the same jobs, found {_difference(first, source)}"
            )
        if source.plan.output != first.plan.output:
            raise RunFolderError(
                f"{where}: expected images written alike, found {first.plan.output} and "
                f"{source.plan.output}"
            )
        if source.plan.batches != first.plan.batches:
            raise RunFolderError(
                f"{where}: expected the same batches, found {first.plan.cut} and "
                f"{source.plan.cut}; --max-batch-size and memory decide how many jobs are in a "
                "batch, and have to be the same for all shards"
            )


def _difference(first: _Source, second: _Source) -> str:
    """Returns in words how the jobs of two shards differ."""
    ours, theirs = _keys(first.db), _keys(second.db)
    for own, other, source in ((ours, theirs, first), (theirs, ours, second)):
        lacking = [job_id for job_id in own if job_id not in other]
        if lacking:
            jobs = counted(len(lacking), "job")
            return f"{jobs} that only {source.shard.words} has, such as {lacking[0]}"
    changed = [job_id for job_id, key in ours.items() if theirs[job_id] != key]
    if changed:
        jobs = counted(len(changed), "job")
        return f"{jobs} with another definition, model or setting, such as {changed[0]}"
    return "them in another order"


def _keys(db: sqlite3.Connection) -> dict[str, str]:
    query = "SELECT id, key FROM jobs WHERE wanted = 1 AND seen = ? ORDER BY position"
    return dict(db.execute(query, (tables.latest_reading(db),)).fetchall())


class _Merge:
    """One merge into a folder that is held.

    Args:
        run_dir: The joined folder.
        database: Its state.
        sources: The shards, by their numbers.
    """

    def __init__(self, run_dir: RunDir, database: Database, sources: Sequence[_Source]) -> None:
        self._run_dir = run_dir
        self._database = database
        self._sources = sources
        self.unfinished: dict[int, int] = {}
        self.missing_files: list[str] = []

    def begin(self) -> None:
        """Makes a new folder that of the manifest, with all its jobs to be run.

        Raises:
            RunFolderError: The folder is that of another run.
        """
        first = self._sources[0]
        own = {"jobs": first.plan.jobs, "batches": first.plan.batches, "count": first.shard.count}
        with self._database.transaction() as db:
            text = tables.get_meta(db, _MERGE)
            has_jobs = db.execute("SELECT 1 FROM jobs LIMIT 1").fetchone() is not None
            if text is None and not has_jobs:
                self._run_dir.require_no_outputs()
                self._add_jobs(db)
                tables.set_meta(db, _MERGE, json.dumps({**own, "sessions": 0}))
                return
            found = json.loads(text or "{}")
            sessions = found.pop("sessions", None)
            if found != own:
                kind = "another merge" if found else "a run"
                raise RunFolderError(
                    f"{self._run_dir.root}: expected a new folder or that of an unfinished merge "
                    f"of these shards, found that of {kind}; give another --output-dir"
                )
            if int(tables.get_meta(db, "session") or 0) != sessions:
                raise RunFolderError(
                    f"{self._run_dir.root}: expected a folder that only sensebatch merge has "
                    "written to, found one that sensebatch run has continued; give another "
                    "--output-dir"
                )

    def _add_jobs(self, db: sqlite3.Connection) -> None:
        source = self._sources[0].db
        db.execute("INSERT OR IGNORE INTO meta VALUES ('run', ?)", (uuid.uuid4().hex[:12],))
        tables.set_meta(db, "reading", "1")
        extension = tables.get_meta(source, tables.EXTENSION)
        if extension is not None:
            tables.set_meta(db, tables.EXTENSION, extension)
        places = {
            absolute: os.path.relpath(absolute, self._run_dir.root)
            for shard in self._sources
            for absolute, _ in json.loads(tables.get_meta(shard.db, MANIFESTS) or "[]")
        }
        tables.set_meta(db, MANIFESTS, json.dumps([list(place) for place in places.items()]))
        groups = source.execute("SELECT number, definition FROM groups").fetchall()
        db.executemany("INSERT INTO groups VALUES (?, ?)", groups)
        fresh = {"seen": 1, "status": PENDING, "attempts": 0, "tries": 0, "alone": 0}
        fresh |= {"current": None, "finish_reason": None}
        rows = source.execute(
            "SELECT * FROM jobs WHERE wanted = 1 AND seen = ? ORDER BY position",
            (tables.latest_reading(source),),
        )
        names = [column[0] for column in rows.description]
        marks = ", ".join("?" * (len(names) - 1))
        statement = f"INSERT INTO jobs ({', '.join(names[1:])}) VALUES ({marks})"
        for row in rows:
            values = dict(zip(names, row, strict=True)) | fresh | {"outputs": "[]"}
            db.execute(statement, [values[name] for name in names[1:]])

    def add(self, source: _Source) -> None:
        """Joins what a shard has and the folder has not.

        Raises:
            RunFolderError: The shard was joined before from another folder.
        """
        progress = self._progress(source)
        while rows := source.db.execute(
            "SELECT seq, job_id, row FROM attempts WHERE seq > ? ORDER BY seq LIMIT ?",
            (progress.seq, _CHUNK),
        ).fetchall():
            self._add_rows(source, progress, rows)
        self._add_batches(source, progress)
        query = "SELECT count(*) FROM jobs WHERE wanted = 1 AND seen = ? AND status = ?"
        values = (tables.latest_reading(source.db), PENDING)
        if left := source.db.execute(query, values).fetchone()[0]:
            self.unfinished[source.shard.number] = left

    def missing(self) -> tuple[int, ...]:
        """Returns the numbers of shards that nothing is known of."""
        with self._database.reading() as db:
            numbers = range(1, self._sources[0].shard.count + 1)
            return tuple(n for n in numbers if tables.get_meta(db, f"{_MERGE}:{n}") is None)

    def _progress(self, source: _Source) -> _Progress:
        run = tables.get_meta(source.db, "run") or ""
        with self._database.reading() as db:
            text = tables.get_meta(db, f"{_MERGE}:{source.shard.number}")
        if text is None:
            return _Progress(run=run)
        progress = _Progress(**json.loads(text))
        if progress.run != run:
            raise RunFolderError(
                f"{source.root}: expected the folder that {source.shard.words} was joined from "
                f"before, found another one; give another --output-dir"
            )
        return progress

    def _keep(self, db: sqlite3.Connection, source: _Source, progress: _Progress) -> None:
        name = f"{_MERGE}:{source.shard.number}"
        tables.set_meta(db, name, json.dumps(asdict(progress)))

    def _add_rows(
        self, source: _Source, progress: _Progress, rows: Sequence[tuple[int, str, str]]
    ) -> None:
        """Puts the files of some rows in place, then joins the rows and what became of the jobs."""
        read = [row_from_json(text) for _, _, text in rows]
        jobs = [_job(source.db, job_id) for job_id in dict.fromkeys(row[1] for row in rows)]
        names = [row["error_file"] for row in read if row["error_file"]]
        names += [name for job in jobs for name in json.loads(job["outputs"])]
        self._place(source, names)
        with self._database.transaction() as db:
            seqs: dict[int | None, int | None] = {None: None}
            for (seq, job_id, _), row in zip(rows, read, strict=True):
                row["session"] = self._session(db, progress, row["session"])
                seqs[seq] = db.execute(
                    "INSERT INTO attempts (job_id, row) VALUES (?, ?)", (job_id, row_to_json(row))
                ).lastrowid
            for job in jobs:
                values = {name: value for name, value in job.items() if name not in _OWN}
                if (current := values.pop("current")) in seqs:
                    # Otherwise it came with earlier rows, or comes with later ones.
                    values["current"] = seqs[current]
                setting = ", ".join(f"{name} = ?" for name in values)
                db.execute(
                    f"UPDATE jobs SET {setting} WHERE folded = ?",
                    (*values.values(), values["folded"]),
                )
            progress.seq = rows[-1][0]
            self._keep(db, source, progress)

    def _session(self, db: sqlite3.Connection, progress: _Progress, session: int) -> int:
        """Returns what a session of a shard is called in the joined folder."""
        number = progress.sessions.get(str(session))
        if number is None:
            number = progress.sessions[str(session)] = tables.increment(db, "session")
            found = json.loads(tables.get_meta(db, _MERGE) or "{}")
            tables.set_meta(db, _MERGE, json.dumps({**found, "sessions": number}))
        return number

    def _add_batches(self, source: _Source, progress: _Progress) -> None:
        """Joins the interrupted batches of a shard with the images that were kept of them."""
        batches = tables.started_batches(source.db)
        with self._database.reading() as db:
            query = "SELECT seq FROM sqlite_sequence WHERE name = 'batches'"
            last = (db.execute(query).fetchone() or (0,))[0]
        for seq, batch in enumerate(batches, start=last + 1):
            self._place_kept(source, batch.seq, seq)
        with self._database.transaction() as db:
            db.executemany("DELETE FROM batches WHERE seq = ?", ((n,) for n in progress.batches))
            progress.batches = [
                tables.insert_batch(
                    db,
                    batch.members,
                    starts=batch.starts,
                    is_suspect=batch.is_suspect,
                    seq=seq,
                )
                for seq, batch in enumerate(batches, start=last + 1)
            ]
            self._keep(db, source, progress)

    def _place_kept(self, source: _Source, seq: int, new: int) -> None:
        folder, target = source.run_dir.kept_images / str(seq), self._run_dir.kept_images / str(new)
        shutil.rmtree(target, ignore_errors=True)
        for path in sorted(folder.glob("*.safetensors")):
            _link(path, target / path.name)
            sync_folders([target / path.name], self._run_dir.root)

    def _place(self, source: _Source, names: Sequence[str]) -> None:
        """Puts files of a shard at the same paths in the joined folder."""
        placed = []
        for name in names:
            path = PurePosixPath(name)
            if _link(source.root / path, self._run_dir.root / path):
                placed.append(self._run_dir.root / path)
            else:
                self.missing_files.append(str(source.root / path))
        sync_folders(placed, self._run_dir.root)

    def write_texts(self) -> None:
        """Writes run.yaml, and what the shards' commands said."""
        settings = read_settings(self._sources[0].run_dir.settings)
        settings.pop(SHARD, None)
        self._run_dir.write_settings(settings)
        said = []
        for source in self._sources:
            with storage_errors(source.run_dir.messages):
                if source.run_dir.messages.exists():
                    text = source.run_dir.messages.read_text(encoding="utf-8", errors="replace")
                    said.append(f"{source.shard.words}, {source.root}:\n{text}")
        if said:
            write_atomic(self._run_dir.messages, "\n".join(said).encode())


def _job(db: sqlite3.Connection, job_id: str) -> dict[str, Any]:
    found = db.execute("SELECT * FROM jobs WHERE folded = ?", (folded_id(job_id),))
    return dict(zip((column[0] for column in found.description), found.fetchone(), strict=True))


def _link(source: Path, target: Path) -> bool:
    """Puts a file at another path too, as a link or a copy; returns whether there is one.

    Raises:
        StorageError: The file system failed.
    """
    with storage_errors(source):
        if target.exists() and (not source.exists() or source.samefile(target)):
            return True
        if not source.exists():
            return False
    temporary = target.with_name(f".{target.name}.tmp")
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or a file system without links
            with atomic_file(target) as file, source.open("rb") as copied:
                shutil.copyfileobj(copied, file)
            return True
        os.replace(temporary, target)  # noqa: PTH105, one name to stop at in tests
    return True
