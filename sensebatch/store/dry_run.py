"""What a run would do with each job, from a copy of the state: nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sensebatch.store.attempts import BLOCKED, DONE, FAILED, HELD
from sensebatch.store.ingest import MADE_AGAIN, Changes
from sensebatch.store.run_dir import RunDir
from sensebatch.store.state import State
from sensebatch.store.store import require_whole


class Verdict(StrEnum):
    """What becomes of a job."""

    KEPT = "kept"
    """It is done, and stays so."""
    DRAWN = "drawn"
    """It has no files yet."""
    REDRAWN = "redrawn"
    """Its files are replaced."""
    CONTINUED = "continued"
    """Its batch was interrupted."""
    LEFT = "left failed"
    """It failed, and is not tried again."""
    BLOCKED = "blocked"
    """It starts from an image of a job that failed."""
    HELD = "held"
    """It is a try that may not be needed, or starts from one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What becomes of a job, and why."""

    id: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a run would do."""

    changes: Changes
    """What the manifests change in the folder."""
    jobs: tuple[Decided, ...]
    """In the order of the manifests."""


def dry_run(
    root: Path,
    read: Callable[[State], Changes],
    again: Callable[[State], Collection[str]],
    *,
    retry_failed: bool,
) -> DryRun:
    """Returns what a run in a folder would do; works beside another run, and makes no folder.

    Args:
        root: The folder, which need not exist.
        read: Reads the manifests into a state.
        again: Has jobs of a state run again that were done, with those that start from them, and
            returns the ids of the former.
        retry_failed: Whether failed jobs are tried again.

    Raises:
        RunFolderError: It is not a run's folder and cannot be one, or its state has to be rebuilt.
    """
    run_dir = RunDir(root)
    if not run_dir.state.exists():
        run_dir.require_nothing_in_the_way()
        run_dir.require_no_outputs()
    with closing(State(run_dir.state, as_copy=True)) as state:
        if run_dir.state.exists() and not run_dir.in_use():
            require_whole(run_dir, state)
        changes = read(state)
        before = {job.id: job.status for job in state.progress()}
        picked = again(state)
        reasons = {
            job.id: "picked" if job.id in picked else MADE_AGAIN
            for job in state.progress()
            if job.status != before[job.id]
        }
        if retry_failed:
            state.retry_failed()
        return DryRun(
            changes=changes,
            jobs=tuple(_decided(state, before, reasons, changes)),
        )


_LEFT = {
    DONE: (Verdict.KEPT, "done"),
    FAILED: (Verdict.LEFT, "failed; --retry-failed tries it again"),
    BLOCKED: (Verdict.BLOCKED, "starts from an image of a job that failed"),
    HELD: (Verdict.HELD, "run only if too few others are accepted"),
}
"""What becomes of jobs that are not run, by their status."""


def _decided(
    state: State, before: dict[str, str], again: dict[str, str], changes: Changes
) -> Iterator[Decided]:
    children = {held.job for held in state.held_jobs()}
    for job in state.progress():
        verdict = Verdict.REDRAWN if job.has_files else Verdict.DRAWN
        if job.id in children:
            verdict, reason = Verdict.HELD, "starts from a try that may not be needed"
        elif job.status in _LEFT:
            verdict, reason = _LEFT[job.status]
        elif job.is_started:
            verdict, reason = Verdict.CONTINUED, "interrupted"
        elif job.id in again:
            reason = again[job.id]
        elif job.number in changes.reasons:
            reason = changes.reasons[job.number]
        elif before[job.id] == FAILED:
            reason = "failed before"
        elif job.has_files:
            reason = "changed before, and not drawn since"
        else:
            reason = "tried before" if job.attempts else "new"
        yield Decided(id=job.id, verdict=verdict, reason=reason)
