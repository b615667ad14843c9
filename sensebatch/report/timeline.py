"""What each worker's device did when, from the log: its batches, their phases, the waiting between.

Pure: a table in, figures and text out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sensebatch.units import counted

_SHARED = [
    "session",
    "worker",
    "node",
    "batch_id",
    "started_at",
    "task",
    "width",
    "height",
    "think",
    "queue_s",
    "wait_s",
    "prefill_s",
    "think_s",
    "denoise_s",
    "total_s",
]
"""Figures of a batch: the same in each of its rows."""
COLUMNS = [*_SHARED, "job_id", "num_images", "function"]
"""What a log must have."""

_SECONDS = ("start", "waited", "prefill", "think", "denoise", "other")
"""Columns of the printed table."""


def group_name(task: str, width: int | None, height: int | None, *, think: bool) -> str:
    """Returns what a report calls jobs of a kind: the task, the size, and whether they think."""
    size = "" if width is None else f" {width}x{height}"
    return f"{task}{size}{' with thinking' if think else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch through the engine. Seconds."""

    session: int
    worker: int
    """Number of the worker; 0 in logs that do not say."""
    node: str | None
    """Name of its host; None in logs that do not say."""
    batch_id: str
    task: str
    width: int | None
    """Pixels; None for jobs that make no images."""
    height: int | None
    think: bool
    jobs: int
    images: int
    start_s: float
    """From the start of the session's run to the start of the batch."""
    wait_s: float | None
    """The worker's device waited for it; None for its first of a session, and in older logs."""
    prefill_s: float
    think_s: float
    denoise_s: float
    other_s: float
    """Generation outside the phases: copying images back, and the like."""
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How long devices waited between batches."""

    seconds: float
    batches: int
    """How many batches it is known for."""
    share: float
    """The waiting as a part of these batches' generation and waiting together."""


def of_engines(log: pa.Table) -> pa.Table:
    """Returns the rows of a log that engines made, and not the user's functions beside them."""
    return log.filter(pc.is_null(log["function"]))


def timeline(log: pa.Table) -> tuple[Batch, ...]:
    """Returns every batch that went through an engine, worker by worker, in their order."""
    log = of_engines(log)
    log = log.filter(pc.is_valid(log["batch_id"]))
    table = log.group_by(_SHARED).aggregate([("job_id", "count"), ("num_images", "sum")])
    batches = [
        Batch(
            session=row["session"],
            worker=row["worker"] or 0,
            node=row["node"] or None,
            batch_id=row["batch_id"],
            task=row["task"],
            width=row["width"],
            height=row["height"],
            think=row["think"],
            jobs=row["job_id_count"],
            images=row["num_images_sum"],
            start_s=row["queue_s"],
            wait_s=row["wait_s"],
            prefill_s=row["prefill_s"],
            think_s=row["think_s"],
            denoise_s=row["denoise_s"],
            other_s=row["total_s"] - row["prefill_s"] - row["think_s"] - row["denoise_s"],
            total_s=row["total_s"],
        )
        for row in table.to_pylist()
    ]
    order = sorted(batches, key=lambda batch: (batch.session, batch.worker, batch.start_s))
    return tuple(order)


def waiting(batches: Sequence[Batch]) -> Waiting | None:
    """Returns the waiting over all batches that it is known of; None if there are none."""
    known = [(batch.wait_s, batch.total_s) for batch in batches if batch.wait_s is not None]
    seconds = sum(wait_s for wait_s, _ in known)
    together = seconds + sum(total_s for _, total_s in known)
    if not together:
        return None
    return Waiting(seconds=seconds, batches=len(known), share=seconds / together)


def format_waiting(found: Waiting) -> str:
    """Returns the waiting as a line of the summary, without its title."""
    batches = counted(found.batches, "batch")
    return f"{found.seconds:.3f} s before {batches} ({found.share:.2%} of their time)"


def timeline_table(batches: Sequence[Batch]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles and the rows of a table with one row a batch; the last column is words.

    Where there are several workers, the batches of each follow one another.
    """
    names = [*(f"{name}\ns" for name in _SECONDS), "jobs", "images", "what"]
    rows = [_row(batch) for batch in batches]
    if len({batch.worker for batch in batches}) > 1:
        names = ["worker", *names]
        rows = [[str(batch.worker), *row] for batch, row in zip(batches, rows, strict=True)]
    return names, rows


def waiting_lines(batches: Sequence[Batch]) -> list[str]:
    """Returns the share of the waiting in words, of all batches and of each of several workers."""
    workers = sorted({batch.worker for batch in batches})
    totals = {"waiting": waiting(batches)}
    if len(workers) > 1:
        for worker in workers:
            own = [batch for batch in batches if batch.worker == worker]
            totals[f"waiting of worker {worker}"] = waiting(own)
    return [f"{name}: {format_waiting(found)}" for name, found in totals.items() if found]


def _row(batch: Batch) -> list[str]:
    seconds = (batch.prefill_s, batch.think_s, batch.denoise_s, batch.other_s)
    return [
        f"{batch.start_s:.3f}",
        "-" if batch.wait_s is None else f"{batch.wait_s:.3f}",
        *(f"{value:.3f}" for value in seconds),
        str(batch.jobs),
        str(batch.images),
        group_name(batch.task, batch.width, batch.height, think=batch.think),
    ]
