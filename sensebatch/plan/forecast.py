"""How long a plan takes several workers, and how far they come by a deadline.

Pure. The batches are those of the plan, in the order that a run with a deadline has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sensebatch.plan.batches import Plan, in_manifest_order
from sensebatch.plan.workers import take_turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What becomes of a plan's batches."""

    workers: int
    seconds: float
    """Until the last batch is through."""
    tail_s: float
    """How much of that is due to workers that find no batch any more while others still work: what
    it is longer than the work divided by the number of workers."""
    batches_in_time: int
    """Batches that are through by the deadline; all of them without one."""
    jobs_in_time: int
    """Jobs of these batches."""
    next_job: str | None
    """The first job of the first batch that is not begun; None if all are through."""


def forecast(
    batches: Iterable[tuple[Sequence[str], float]],
    num_workers: int,
    available_s: float | None = None,
) -> Forecast:
    """Returns what several workers take for batches, and how far they come.

    As in a run, the first batch that would not be through in time is not begun, and none after it.

    Args:
        batches: The ids and the seconds of each, in the order they are handed out.
        num_workers: At least one.
        available_s: Seconds until the deadline; None without one.
    """
    listed = list(batches)
    turns = take_turns((seconds for _, seconds in listed), num_workers)
    last, num_batches, num_jobs, next_job = 0.0, 0, 0, None
    for (ids, _), (_, end) in zip(listed, turns, strict=True):
        last = max(last, end)
        if next_job is None and available_s is not None and end > available_s:
            next_job = ids[0]
        if next_job is None:
            num_batches += 1
            num_jobs += len(ids)
    return Forecast(
        workers=num_workers,
        seconds=last,
        tail_s=last - sum(seconds for _, seconds in listed) / num_workers,
        batches_in_time=num_batches,
        jobs_in_time=num_jobs,
        next_job=next_job,
    )


def timed_batches(
    plan: Plan, ids: Iterable[str], job_seconds: Sequence[float], *, by_manifest: bool
) -> list[tuple[tuple[str, ...], float]]:
    """Returns the batches of a plan with their seconds, in the order they are run.

    Args:
        plan: The plan.
        ids: Of its jobs, in manifest order.
        job_seconds: Seconds of a job of each group.
        by_manifest: Whether batches come in the order of their first jobs, as with a deadline.
    """
    of_job: Mapping[str, float] = {
        job_id: seconds
        for group, seconds in zip(plan.groups, job_seconds, strict=True)
        for job_id in (*group.fresh, *group.alone)
    }
    batches = (
        in_manifest_order(plan, ids)
        if by_manifest
        else (batch for group in plan.groups for batch in group.batches())
    )
    return [(batch, sum(of_job[job_id] for job_id in batch)) for batch in batches]
