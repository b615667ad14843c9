"""What `sensebatch plan` says of time on several workers and before a deadline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sensebatch.errors import ConfigError
from sensebatch.plan.batches import Demand, GroupPlan, Plan
from sensebatch.plan.forecast import forecast, timed_batches
from sensebatch.plan.speed import Speed
from sensebatch.units import counted, duration

Summary = Mapping[str, Any]


def unknown_line(options: Sequence[str]) -> str:
    """Returns what is said where no time is known.

    Args:
        options: What was asked for; at least one.
    """
    *first, last = options
    asked = f"{', '.join(first)} and {last}" if first else last
    return (
        f"No time is known for {asked}: sensebatch doctor measures a GPU, and --speed-of takes the "
        "speed of a run's folder."
    )


def forecast_summary(
    plan: Plan,
    ids: Sequence[str],
    placements: Sequence[Summary] | None,
    *,
    workers: int,
    available_s: float | None,
    speed_of: Path | None,
) -> dict[str, Any] | None:
    """Returns what `plan --json` says of the future; None where no time is known.

    Jobs that do not fit the measured GPU are left out.

    Args:
        plan: The plan.
        ids: Of its jobs, in manifest order.
        placements: What the memory summary says of each placement.
        workers: How many there are.
        available_s: Seconds until the deadline; None without one.
        speed_of: A run's folder; None for the least times of the placement.

    Raises:
        ConfigError: The folder's log measures no speed.
        RunFolderError: It is not a run's folder.
    """
    if speed_of is not None:
        seconds = _measured(plan, speed_of)
    elif placements is not None and len(placements) == 1 and placements[0]["seconds"] is not None:
        fitting = list(_fitting(plan, placements[0]["groups"]))
        plan = Plan(groups=tuple(group for group, _ in fitting))
        seconds = [of_job for _, of_job in fitting]
    else:
        return None
    by_manifest = available_s is not None
    batches = timed_batches(plan, ids, seconds, by_manifest=by_manifest, num_workers=workers)
    found = forecast(batches, workers, available_s)
    return {
        "is_least": speed_of is None,
        "batches": plan.num_batches,
        "jobs": plan.num_jobs,
        **asdict(found),
    }


def _fitting(plan: Plan, groups: Sequence[Summary]) -> Iterator[tuple[GroupPlan, float]]:
    """Yields the groups with the jobs that fit the GPU, and the least seconds of a job of each.

    Args:
        plan: The plan.
        groups: What the placement says of each group.
    """
    for group, own in zip(plan.groups, groups, strict=True):
        rest = group.without([Demand(**one) for one in own["refused_demands"]])
        if rest is not None:
            of_job = own["seconds"]["images"] / rest.num_jobs
            yield replace(rest, batch_size=own["batch_size"]), of_job


def _measured(plan: Plan, folder: Path) -> list[float]:
    """Returns the seconds of a job of each group, by the latest batches of a run."""
    from sensebatch.store.status import read_status

    speed = Speed()
    for batch in read_status(folder).recent:
        if not batch.kept_images:
            speed.measured(batch.group, batch.jobs, batch.total_s)
    seconds = [speed.of(group.group, 1) for group in plan.groups]
    if None in seconds:
        raise ConfigError(
            f"--speed-of: expected the folder of a run that has drawn something, found {folder}"
        )
    return [one for one in seconds if one is not None]


def forecast_lines(found: Summary, until: float | None) -> Iterator[str]:
    """Yields a forecast in words.

    Args:
        found: Of `forecast_summary`.
        until: The deadline, in seconds since the epoch.
    """
    least, most = ("at least", "at most ") if found["is_least"] else ("about", "about ")
    workers = counted(found["workers"], "worker")
    line = f"With {workers} {least} {duration(found['seconds'])}"
    if found["workers"] > 1:
        tail = duration(found["tail_s"])
        line += f", {tail} of it because the last batches leave workers idle"
    yield f"{line}."
    if until is None:
        return
    end = f"By {datetime.fromtimestamp(until):%H:%M (%Y-%m-%d)}"
    if found["next_job"] is None:
        yield f"{end} all of {counted(found['jobs'], 'job')}."
        return
    yield (
        f"{end} {most}{found['jobs_in_time']:,} of {counted(found['jobs'], 'job')}, in "
        f"{found['batches_in_time']:,} of {counted(found['batches'], 'batch')}; "
        f"{found['next_job']} is in the first that is not begun."
    )
