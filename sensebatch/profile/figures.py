"""The figures of a case, from the log of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sensebatch.report.summary import summarise

_BATCH = ["session", "batch_id", "started_at"]
_OF_BATCH = ["total_s", "wait_s", "think_s", "denoise_s", "num_kept_images"]
_OF_JOB = ["num_images", "image_tokens", "think_tokens", "text_tokens"]

Batches = Sequence[Mapping[str, float]]
"""Seconds and counts of each batch that made images, in the order they were run."""


def figures(log: pa.Table, *, num_steps: int) -> dict[str, Any]:
    """Returns what a log says of a case, by the columns of `rows.Row`.

    The steady figures leave out the first batch, which also pays for what a process does once.

    Args:
        log: The log of one run, with at least one row.
        num_steps: Denoising steps of every image.
    """
    summary = summarise(log)
    total = summary.total
    batches = _batches(log.filter(pc.field("status") == "done"))
    # Images kept when memory ran out took none of their batch's seconds.
    drawn, steady = (
        [batch for batch in some if not batch["num_kept_images"]] for some in (batches, batches[1:])
    )
    last = log.slice(log.num_rows - 1).to_pylist()[0]
    found = {
        "vram_mode": summary.vram_mode,
        "dtype": summary.dtype,
        "attn_backend": summary.attn_backend,
        "device": last["device"],
        "torch_version": last["torch_version"],
        "load_s": summary.load_s,
        "compile_s": last["compile_s"],
        "load_peak_allocated_bytes": summary.load_peak.allocated_bytes,
        "load_peak_reserved_bytes": summary.load_peak.reserved_bytes,
        "load_peak_rss_bytes": summary.load_peak.rss_bytes,
        "calls": total.calls,
        "jobs_done": total.jobs,
        "images": total.images,
        "text_tokens": total.text_tokens,
        "wall_s": total.wall_s,
        "wait_share": None if summary.waiting is None else summary.waiting.share,
        "rest_share": _rest_share(batches),
        "step_s": _per(drawn, ["denoise_s"], ["num_images"], num_steps),
        "steady_step_s": _per(steady, ["denoise_s"], ["num_images"], num_steps),
        "seconds_per_image": total.seconds_per_image,
        "image_tok_per_s": total.image_tok_per_s,
        "steady_image_tok_per_s": _per(steady, ["image_tokens"], ["total_s"]),
        "jobs_per_s": _per(batches, ["jobs"], ["total_s", "wait_s"]),
        "steady_jobs_per_s": _per(batches[1:], ["jobs"], ["total_s", "wait_s"]),
        "text_tok_per_s": _per(batches, ["think_tokens", "text_tokens"], ["think_s"]) or None,
    }
    if total.calls:
        found |= {f"peak_{name}": value for name, value in asdict(summary.peak).items()}
    return found


def _batches(done: pa.Table) -> Batches:
    seconds = [(name, "max") for name in _OF_BATCH]
    counts = [*((name, "sum") for name in _OF_JOB), ("job_id", "count")]
    table = done.group_by(_BATCH).aggregate([*seconds, *counts]).sort_by("started_at")
    return [
        {name: row[f"{name}_max"] or 0 for name in _OF_BATCH}
        | {name: row[f"{name}_sum"] for name in _OF_JOB}
        | {"jobs": row["job_id_count"]}
        for row in table.to_pylist()
    ]


def _rest_share(batches: Batches) -> float | None:
    """Returns the share of the time, waits included, in which nothing was denoised.

    The first batch pays for what a process does once, and beside the last one nothing is read for
    another; both are left out.
    """
    between = [batch for batch in batches[1:-1] if not batch["num_kept_images"]]
    drawing = _per(between, ["denoise_s"], ["total_s", "wait_s"])
    return 1 - drawing if drawing else None


def _per(
    batches: Batches, amount: Sequence[str], per: Sequence[str], times: int = 1
) -> float | None:
    """Returns an amount over all batches by another, `times` as many; None by nothing."""
    over, under = (
        sum(batch[name] for batch in batches for name in names) for names in (amount, per)
    )
    return over / (under * times) if under else None
