"""What the device did when, batch by batch, from the log: its phases, and its waiting between.

Pure: a table in, figures and text out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

_SHARED = [
    "session",
    "batch_id",
    "started_at",
    "task",
    "width",
    "height",
    "queue_s",
    "wait_s",
    "prefill_s",
    "think_s",
    "denoise_s",
    "total_s",
]
"""Figures of a batch: the same in each of its rows."""
COLUMNS = [*_SHARED, "job_id", "num_images"]
"""What a log must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch through the engine. Seconds."""

    session: int
    batch_id: str
    task: str
    width: int
    height: int
    jobs: int
    images: int
    start_s: float
    """From the start of the session's run to the start of the batch."""
    wait_s: float | None
    """The device waited for it; None for the first of a session, and in older logs."""
    prefill_s: float
    think_s: float
    denoise_s: float
    other_s: float
    """Of the generation, in none of the phases: pictures copied back, and the like."""
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How long the device waited between batches."""

    seconds: float
    batches: int
    """Batches that it is known of."""
    share: float
    """Of the seconds of these batches' generation and the waiting together."""


def timeline(log: pa.Table) -> tuple[Batch, ...]:
    """Returns every batch that went through the engine, in the order they were begun."""
    log = log.filter(pc.is_valid(log["batch_id"]))
    table = log.group_by(_SHARED).aggregate([("job_id", "count"), ("num_images", "sum")])
    batches = [
        Batch(
            session=row["session"],
            batch_id=row["batch_id"],
            task=row["task"],
            width=row["width"],
            height=row["height"],
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
    return tuple(sorted(batches, key=lambda batch: (batch.session, batch.start_s)))


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
    return (
        f"{found.seconds:.3f} s between {found.batches} batches and those before them "
        f"({found.share:.2%} of their time)"
    )


def format_timeline(batches: Sequence[Batch]) -> str:
    """Returns a Markdown table, one line a batch, and the share of the waiting below it."""
    lines = [
        "| start s | waited s | prefill s | think s | denoise s | other s | jobs | images | what |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for batch in batches:
        waited = "-" if batch.wait_s is None else f"{batch.wait_s:.3f}"
        lines.append(
            f"| {batch.start_s:.3f} | {waited} | {batch.prefill_s:.3f} | {batch.think_s:.3f} "
            f"| {batch.denoise_s:.3f} | {batch.other_s:.3f} | {batch.jobs} | {batch.images} "
            f"| {batch.task} {batch.width}x{batch.height} |"
        )
    found = waiting(batches)
    if found is not None:
        lines += ["", f"waiting: {format_waiting(found)}"]
    return "\n".join(lines)
