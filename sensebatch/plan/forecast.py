"""How long a plan takes several workers, and how far they come by a deadline.

Pure. The batches are those of the plan, in the order that a run with a deadline has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sensebatch.plan.batches import GroupPlan, Plan, in_manifest_order
from sensebatch.plan.tail import handed_out, works
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
    plan: Plan,
    ids: Iterable[str],
    job_seconds: Sequence[float],
    *,
    by_manifest: bool,
    num_workers: int = 1,
) -> list[tuple[tuple[str, ...], float]]:
    """Returns the batches of a plan with their seconds, in the order they are run.

    Args:
        plan: The plan.
        ids: Of its jobs, in manifest order.
        job_seconds: Seconds of a job of each group, on average.
        by_manifest: Whether batches come in the order of their first jobs, as with a deadline.
        num_workers: How many workers are handed them.
    """
    of_batch: Mapping[str, float] = {
        batch[0]: seconds
        for group, of_job in zip(plan.groups, job_seconds, strict=True)
        for batch, seconds in _batch_seconds(group, of_job)
    }
    batches = (
        in_manifest_order(plan, ids)
        if by_manifest
        else (batch for batches in handed_out(plan, num_workers) for batch in batches)
    )
    return [(batch, of_batch[batch[0]]) for batch in batches]


def _batch_seconds(group: GroupPlan, of_job: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yields the batches of a group, each with its part of the group's seconds."""
    if not group.kinds:
        yield from ((batch, of_job * len(batch)) for batch in group.batches())
        return
    expected = works(group)
    by_work = of_job * group.num_jobs / sum(expected)
    for batch, work in zip(group.batches(), expected, strict=True):
        yield batch, work * by_work
