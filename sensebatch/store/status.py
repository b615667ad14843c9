"""A look at a run's folder from outside, while a process works in it or after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sensebatch.errors import RunFolderError, StorageError
from sensebatch.jobs import GroupKey, group_key
from sensebatch.store.acceptance import HeldJob, Series
from sensebatch.store.attempts import row_from_json
from sensebatch.store.kept import KeptImages
from sensebatch.store.run_dir import RunDir
from sensebatch.store.shards import Shard
from sensebatch.store.state import Counts, State
from sensebatch.store.state_dir import Pointer, read_pointer
from sensebatch.store.store import require_whole

NUM_RECENT = 2000
"""Most rows of the log that a speed is measured by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedJob:
    """A job that failed for good, and why."""

    job_id: str
    error_type: str
    error_message: str
    error_file: str | None
    """Path of the traceback, in the run's folder; None where no file can have its name."""
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PastBatch:
    """A batch of the latest process that worked in the folder."""

    group: GroupKey
    jobs: int
    images: int
    kept_images: int
    """Those of its images that an interrupted batch had drawn, in none of its seconds."""
    started_at: datetime
    finished_at: datetime
    total_s: float
    """Seconds in the engine."""
    worker: int = 0
    """Number of the worker that ran it."""
    node: str | None = None
    """Name of that worker's host; None in rows that do not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What a run has of images of which only accepted ones are wanted."""

    series: tuple[Series, ...] = ()
    """How many of each are accepted, by their names."""
    held: tuple[HeldJob, ...] = ()
    """The jobs that wait for tries that were not drawn, in the order of the manifests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What the state of a run's folder says, whether a process works in it or not."""

    counts: Counts
    kept_images: int
    """Images of jobs that are not done, kept for the process that resumes them."""
    running: bool
    """Whether a process works in the folder; without one, started jobs are interrupted jobs."""
    failures: tuple[FailedJob, ...]
    """In the order of the manifests."""
    to_come: Mapping[GroupKey, int]
    """Jobs that are still to be run, by group."""
    recent: tuple[PastBatch, ...]
    """The last batches of the latest process, in the order they were committed."""
    shard: Shard | None = None
    """Which shard the folder is; None if it is none."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    """What became of tries, and what waits for them."""
    pointer: Pointer | None = None
    """Where the state is, if it is not in the folder."""


def num_unlogged(root: Path, num_rows: int) -> int:
    """Returns how many attempts of a run log.parquet lacks; 0 where no state can be asked.

    Args:
        root: The run's folder.
        num_rows: The rows of log.parquet.
    """
    run_dir = RunDir(root)
    if not run_dir.state.is_file():
        return 0
    try:
        with closing(State(run_dir.state, read_only=True)) as state:
            return max(state.num_attempts() - num_rows, 0)
    except (RunFolderError, StorageError):
        return 0


def read_acceptance(root: Path) -> Acceptance:
    """Returns what became of tries and what waits for them; nothing where no state can be asked."""
    run_dir = RunDir(root)
    if run_dir.state.is_file():
        with (
            suppress(RunFolderError, StorageError),
            closing(State(run_dir.state, read_only=True)) as state,
        ):
            return _acceptance(state)
    return Acceptance()


def _acceptance(state: State) -> Acceptance:
    return Acceptance(series=tuple(state.series()), held=tuple(state.held_jobs()))


def folder_shard(root: Path) -> Shard | None:
    """Returns which shard a run's folder is; None if it is none, or no state can be asked."""
    run_dir = RunDir(root)
    if not run_dir.state.is_file():
        return None
    try:
        with closing(State(run_dir.state, read_only=True)) as state:
            return state.shard()
    except (RunFolderError, StorageError):
        return None


def read_status(root: Path) -> RunStatus:
    """Returns what the state of a run's folder says; works while another process runs.

    Raises:
        RunFolderError: It is not a run's folder, or its state has to be rebuilt.
    """
    run_dir = RunDir(root)
    run_dir.require_state()
    running = run_dir.in_use()
    state = State(run_dir.state, read_only=True)
    try:
        if not running:
            require_whole(run_dir, state)
        return RunStatus(
            counts=state.counts(),
            kept_images=KeptImages(run_dir.kept_images).num_images(state.is_to_run),
            running=running,
            failures=tuple(_failures(state)),
            to_come=Counter(entry.group for entry in state.entries(with_started=True)),
            recent=tuple(recent_batches(state)),
            shard=state.shard(),
            acceptance=_acceptance(state),
            pointer=read_pointer(root),
        )
    finally:
        state.close()


def _failures(state: State) -> Iterator[FailedJob]:
    for job_id, text in state.failed():
        row = row_from_json(text)
        yield FailedJob(
            job_id=job_id,
            error_type=row["error_type"],
            error_message=row["error_message"],
            error_file=row["error_file"],
            attempts=row["attempt"],
        )


def recent_batches(state: State) -> Iterator[PastBatch]:
    """Yields the last batches of the latest process, in the order they were committed."""
    last = state.num_attempts()
    rows = [row_from_json(text) for text in state.attempt_rows(max(last - NUM_RECENT, 0) + 1, last)]
    batches: dict[tuple[str, datetime], list[dict[str, Any]]] = {}
    for row in rows:
        is_of_engine = row["batch_id"] is not None and row.get("function") is None
        if row["session"] == rows[-1]["session"] and is_of_engine:
            batches.setdefault((row["batch_id"], row["started_at"]), []).append(row)
    for members in batches.values():
        first = members[0]
        try:
            (stored,) = state.jobs([first["job_id"]])
        except KeyError:  # the job has another derived id since
            continue
        yield PastBatch(
            group=group_key(stored.job),
            jobs=len(members),
            images=sum(row["num_images"] for row in members),
            kept_images=first.get("num_kept_images") or 0,
            started_at=first["started_at"],
            finished_at=first["finished_at"],
            total_s=first["total_s"],
            worker=first.get("worker") or 0,
            node=first.get("node"),
        )
